"""Time and peak memory of one DPO step on the head against the number of completion tokens, V, H and the share of
prompt tokens, with a trained and with a frozen head, for every peer.

python -m benchmarks.cpu.sweep [--along tokens vocab ...] [--longest 5] [--head head.safetensors]

A step is policy and reference forward, loss and backward, for two preference pairs whose sequences share the tokens.
Rounds are interleaved in one process. Memory is the resident set's growth in a process of its own, less the returned
gradients. What is expected to take too long or too much is not run, and says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import inputs
from benchmarks.cpu.resident import growth, in_child
from benchmarks.cpu.step import make_problem
from benchmarks.peers import PEERS, Problem, Unavailable

PATHS = ("eager", "trl compacted", "liger", "torch linear_cross_entropy", "fastdpo exact", "fastdpo routed")
DISTINCT = 4096  # tokens; more are copies of these: the statistics are the same, drawing labels takes long
SEQUENCES = 4


@dataclass(frozen=True)
class Point:
    tokens: int = 2048  # completion tokens
    vocab: int = 32768
    hidden: int = 256
    prompt_share: float = 0.5
    frozen: bool = False

    @property
    def rows(self) -> int:
        return round(self.tokens / (1 - self.prompt_share))

    def inputs(self) -> inputs.HeadInputs:
        """Synthetic, of at most DISTINCT rows."""
        found = inputs.synthetic_head(min(self.rows, DISTINCT), self.vocab, max(self.hidden, inputs.RANK))
        return found if found.hidden.shape[1] == self.hidden else inputs.lifted(found, self.hidden)

    def made_in(self, folder: str) -> str:
        """A file with `inputs`: drawing their labels takes longer than a step."""
        made, file = self.inputs(), f"{folder}/head.safetensors"
        save_file({"hidden": made.hidden, "weight": made.weight, "labels": made.labels}, file)
        return file

    def problem(self, head: inputs.HeadInputs) -> Problem:
        problem = make_problem(inputs.repeated(head, self.rows), self.rows // SEQUENCES, self.prompt_share)
        problem.weight.requires_grad_(not self.frozen)
        return problem

    def logits_mib(self, path: str) -> float:
        """fp32 logits that this path holds at once, which others do not."""
        held = {"eager": 2 * self.rows, "liger": 2 * self.rows // (SEQUENCES // 2)}.get(path, 0)
        return held * self.vocab * 4 / 2**20


SWEEPS = {
    "tokens": [Point(tokens=n) for n in (512, 2048, 8192, 32768, 131072)],
    "vocab": [Point(tokens=1024, vocab=v) for v in (32768, 65536, 131072, 262144)],
    "hidden": [Point(tokens=512, hidden=h) for h in (1024, 2048, 4096, 8192)],
    "prompt_share": [Point(round(4096 * (1 - share)), prompt_share=share) for share in (0.0, 0.5, 0.75, 0.875)],
    "frozen": [Point(frozen=frozen) for frozen in (False, True)],
}


def step_memory(path: str, point: Point, head: inputs.HeadInputs) -> float:
    """MiB beyond inputs and returned gradients, in this process."""
    small = inputs.HeadInputs("", head.hidden[:128], head.weight[:2048], head.labels[:128] % 2048)
    PEERS[path](replace(point, tokens=64, prompt_share=0.5).problem(small))  # loads what is loaded once
    problem = point.problem(head)
    grown = growth(lambda: PEERS[path](problem))
    grads = [x.grad for x in (problem.hidden, problem.weight) if x.grad is not None]
    return grown - sum(g.numel() * g.element_size() for g in grads) / 2**20


def in_process(path: str, point: Point, file: str) -> tuple[float | None, str | None]:
    return in_child("-m", "benchmarks.cpu.sweep", "--one", path, json.dumps(asdict(point)), "--head", file)


def memory_again(record: Path, paths: list[str]) -> None:
    """Measures the memory of `paths` again, in place; times stay as they are."""
    document, measured = json.loads(record.read_text()), {}
    for row in document["rows"]:
        if row["path"] in paths and row["seconds"] is not None:
            point = Point(**{name: row[name] for name in asdict(Point())})
            if point not in measured:
                with tempfile.TemporaryDirectory() as folder:
                    file = point.made_in(folder)
                    measured[point] = {path: in_process(path, point, file) for path in paths}
                print(point, measured[point], flush=True)
            row["MiB"], row["failed"] = measured[point][row["path"]]
    document["notes"]["memory measured again"] = {"paths": paths, "environment": inputs.environment()}
    record.write_text(json.dumps(document, indent=1) + "\n")


class Sweep:
    """Measures points; remembers how long every path took, to tell what the next one would take."""

    def __init__(self, args):
        self.args = args
        self.rates: dict[str, float] = {}  # seconds per N V H of the last point that was measured
        self.done: dict[Point, list[dict]] = {}

    def reason_not_to(self, path: str, point: Point) -> str | None:
        size = point.tokens * point.vocab * point.hidden
        expected = self.rates.get(path, 0.0) * size
        if expected > self.args.longest:
            return f"not run: about {expected:.0f} s"
        if 2 * point.logits_mib(path) > self.args.limit * 1024:
            return f"not run: its logits need more than {self.args.limit:g} GiB"
        return None

    def measure(self, point: Point) -> list[dict]:
        if point in self.done:
            return self.done[point]
        rows = self.done[point] = []
        with tempfile.TemporaryDirectory() as folder:
            file = self.args.head or point.made_in(folder)
            head = loaded(file, point)
            why = {path: self.reason_not_to(path, point) for path in self.args.paths}
            times = self.times(point, head, why)
            for path in self.args.paths:
                seconds = times.get(path) or [None]
                row = {"path": path, **asdict(point), "seconds": None, "spread s": None, "rounds": len(times[path])}
                rows.append(row | {"MiB": None, "failed": why[path]})
                if why[path] is None:
                    rows[-1]["seconds"], rows[-1]["spread s"] = statistics.median(seconds), max(seconds) - min(seconds)
                    self.rates[path] = rows[-1]["seconds"] / (point.tokens * point.vocab * point.hidden)
                    if self.args.memory:
                        rows[-1]["MiB"], rows[-1]["failed"] = in_process(path, point, file)
        return rows

    def times(self, point: Point, head: inputs.HeadInputs, why: dict[str, str | None]) -> dict[str, list[float]]:
        problem, times = point.problem(head), {path: [] for path in self.args.paths}
        warm = replace(point, tokens=64).problem(head)
        for round_index in range(-1, self.args.rounds):
            for path in self.args.paths:
                if why[path]:
                    continue
                begin = time.perf_counter()
                try:
                    PEERS[path](warm if round_index < 0 else problem)
                except Unavailable as reason:
                    why[path] = str(reason)
                    continue
                if round_index >= 0:
                    times[path].append(time.perf_counter() - begin)
            problem.hidden.grad = problem.weight.grad = None
        return times


def loaded(file: str, point: Point) -> inputs.HeadInputs:
    head = inputs.load(file)
    return head if head.hidden.shape[1] == point.hidden else inputs.lifted(head, point.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--along", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--paths", nargs="*", default=list(PATHS), help=f"some of {list(PEERS)}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--longest", type=float, default=5, help="seconds: a step expected to take longer is not run")
    parser.add_argument("--limit", type=float, default=8, help="GiB: a peer whose logits need more is not run")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times only")
    parser.add_argument("--memory-again", type=Path, metavar="FILE", help="of --paths, in a result of this program")
    parser.add_argument("--one", nargs=2, metavar=("PATH", "POINT"), help="print this step's MiB, measured here")
    args = parser.parse_args()
    if args.one:
        point = Point(**json.loads(args.one[1]))
        print(step_memory(args.one[0], point, loaded(args.head, point)))
        return
    if args.memory_again:
        memory_again(args.memory_again, args.paths)
        return
    if args.head and "vocab" in args.along:
        print(f"V is that of {args.head}: not swept")
        args.along.remove("vocab")
    sweep, rows = Sweep(args), []
    for axis in args.along:
        sweep.rates.clear()
        for point in SWEEPS[axis]:
            if args.head:
                point = replace(point, vocab=len(inputs.load(args.head).weight))
            rows += [{"along": axis, **row} for row in sweep.measure(point)]
            found = {row["path"]: row["seconds"] or row["failed"] for row in rows[-len(args.paths) :]}
            print(axis, getattr(point, axis), json.dumps(found), flush=True)
    notes = {
        "head": Path(args.head).name if args.head else "synthetic",
        "dtype": "float32",
        "sequences": SEQUENCES,
        "rounds": args.rounds,
        "longest step, s": args.longest,
        "logits at most, GiB": args.limit,
    }
    inputs.report(args.output, "One DPO step on the head along one axis", rows, notes)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
