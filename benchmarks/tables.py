"""The README's tables of measurements, from the committed results: no number is typed by hand.

python benchmarks/tables.py            write them into README.md, between `<!-- table: NAME -->` and `<!-- end -->`
python benchmarks/tables.py --check    fail where README.md says something else

Every table ends with its result file and the command that made it. A table whose file is missing says so.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def error(value: float | None) -> str:
    """Two digits, as 5.8e-3."""
    if value is None:
        return "not measured"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]


def bold(cells: list[str], wanted: bool) -> list[str]:
    return [f"**{cell}**" for cell in cells] if wanted else cells


STEPS = {
    "eager": "eager logits",
    "trl compacted": "TRL's chunked function, given completion rows only",
    "trl as its trainer": "TRL's chunked function as its trainer calls it on a CPU (all rows, statistics)",
    "liger": "Liger `LigerFusedLinearDPOLoss`, not compiled",
    "cce torch_compile": "Cut Cross-Entropy's `torch_compile`, completion rows only",
    "torch linear_cross_entropy": "torch's `linear_cross_entropy`, completion rows only",
    "fastdpo exact": 'fastdpo, `backward="exact"`',
    "fastdpo routed": "fastdpo, routed",
    "two plain GEMMs (torch.mm)": "two plain `torch.mm` GEMMs, for scale",
}


def step(record: dict) -> list[str]:
    routed = next(row["median s"] for row in record["rows"] if row["step"] == "fastdpo routed")
    rows = []
    for row in sorted(record["rows"], key=lambda row: list(STEPS).index(row["step"]) if row["step"] in STEPS else 0):
        name, seconds, spread = STEPS.get(row["step"], row["step"]), row["median s"], row["spread s"]
        cells = [name, f"{seconds:.2f}", f"{spread:.2f}", f"{seconds / routed:.1f}"]
        rows.append(bold(cells, row["step"] == "fastdpo routed"))
    skipped = [f"| {name} | not measured: {why} | | |" for name, why in record["notes"]["skipped"].items()]
    return table(["one DPO step on the head", "seconds", "spread", "times fastdpo routed"], rows) + skipped


def tau(record: dict) -> list[str]:
    blocks, rows = record["notes"]["blocks"], []
    for row in record["rows"]:
        pairs = row["pairs per token"]
        cells = [row["path"], str(blocks) if pairs is None else f"{pairs:.1f}"]
        cells += [f"{row[name]:.2f}" for name in ("passes", "frozen")]
        cells += [error(row[f"{name} error"]) for name in ("dhidden", "dweight")]
        rows.append(bold(cells, row["path"].count(",") == 2))  # the default: two numbers
    header = ["path", f"blocks per token, of {blocks}", "passes", "passes, frozen head"]
    return table(header + ["`dhidden` error", "`dweight` error"], rows)


def bias(record: dict) -> list[str]:
    """Bold: the routed default, whose two gradients have a `tau` each."""
    defaults, rows = dict(zip(("dhidden", "dweight"), record["notes"]["default tau"])), []
    for row in record["rows"]:
        routed, power = row["path"] == "routed", f"2^{math.log2(row['threshold']):.0f}"
        default = not routed and row["threshold"] == record["notes"]["default filter"]
        name = f"routed, `tau` {power}" if routed else f"cce's filter, {power}{', its default' * default}"
        cells = [name, f"{100 * row['share']:.0f}%"]
        for gradient, tau in defaults.items():
            biased, noise = error(row[f"{gradient} bias"]), error(row[f"{gradient} noise"])
            known = f"{biased} ± {error(row[f'{gradient} standard error'])}"
            cells += bold([known, noise] if routed else [biased, "0"], routed and row["threshold"] == tau)
        rows.append(cells)
    header = ["backward", "pairs computed", "`dhidden` bias", "noise", "`dweight` bias", "noise"]
    return table(header, rows)


def memory(record: dict) -> list[str]:
    paths = list(dict.fromkeys(row["path"] for row in record["rows"]))
    found = {(row["N"], row["path"]): row for row in record["rows"]}

    def cell(row: dict | None) -> str:
        if row is None:
            return "not measured"
        return f"{row['MiB']:.0f}" if row["MiB"] is not None else row["failed"]

    logits = {row["N"]: row["logits alone, fp32 MiB"] for row in record["rows"]}
    rows = [[str(n), *(cell(found.get((n, path))) for path in paths), f"{logits[n]:.0f}"] for n in sorted(logits)]
    return table(["completion tokens", *(f"{path}, MiB" for path in paths), "the logits alone, fp32"], rows)


def accuracy(record: dict) -> list[str]:
    keys = ("sequence log-prob, nats", "dhidden", "dhidden, p(label) 0.99 to 1.0", "dweight")
    rows = []
    for row in record["rows"]:
        if row["inputs"] == "bfloat16":
            rows.append(bold([row["path"], *(error(row[key]) for key in keys)], row["path"].startswith("fastdpo")))
    left_out = [f"| {name} | not measured: {why} | | | |" for name, why in record["notes"]["left out"].items()]
    return table(["bf16 inputs", *keys], rows) + left_out


def training(record: dict, last: int = 50) -> list[str]:
    """Means over seeds of the mean of the last steps; the spread is the seeds' own, smallest to largest."""
    header = ["gradient of the head", "seeds", "loss", "margin", "accuracy", "entropy"]
    rows = []
    for path in dict.fromkeys(run["path"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["path"] == path]
        cells = [path, str(len(runs))]
        for name in ("loss", "margin", "accuracy", "entropy"):
            ends = [sum(run[name][-last:]) / len(run[name][-last:]) for run in runs]
            cells.append(f"{sum(ends) / len(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})")
        far = [run["distance"] for run in runs if "distance" in run]
        cells.append(f"{sum(far) / len(far):.3f}" if far else "0")
        rows.append([*cells, f"{sum(run['travelled'] for run in runs) / len(runs):.2f}"])
    return table([*header, "distance to exact", "travelled"], rows)


@dataclass(frozen=True)
class Source:
    render: Callable[[dict], list[str]]
    file: str
    command: str


SOURCES = {
    "step": Source(step, "2026-11-cpu-step.json", "bench_cpu.py --head head.safetensors"),
    "tau": Source(tau, "2026-11-cpu-tau.json", "bench_tau.py --head head.safetensors"),
    "bias": Source(bias, "2026-11-cpu-bias.json", "bench_bias.py --head head.safetensors"),
    "memory": Source(memory, "2026-11-cpu-memory.json", "bench_memory.py --frozen"),
    "context": Source(
        memory, "2026-11-cpu-context.json", "bench_memory.py --tokens 1024 4096 16384 65536 --vocab 32768 --frozen"
    ),
    "accuracy": Source(accuracy, "2026-11-cpu-accuracy.json", "bench_accuracy.py --head head.safetensors"),
    "training": Source(training, "2026-11-training.json", "bench_training.py"),
}


def where_and_when(record: dict) -> str:
    env = record["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    return f"{env['cpu']} ({env['capability']}), {env['threads']} threads, {versions}, {env['date']}"


def rendered(name: str, results: Path = RESULTS) -> str:
    """The Markdown between the marks of table `name`."""
    source = SOURCES[name]
    command = f"`benchmarks/{source.command}`"
    if not (results / source.file).exists():
        return f"\nNot measured yet: {command}\n\n"
    record = json.loads((results / source.file).read_text())
    link = f"[`{source.file}`](benchmarks/results/{source.file})"
    return "\n".join(["", *source.render(record), "", f"{link}: {command}. {where_and_when(record)}.", "", ""])


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table as the results have it. Raises ValueError for a table nobody knows."""

    def replace(match: re.Match) -> str:
        if match[2] not in SOURCES:
            raise ValueError(f"README.md marks a table {match[2]!r}; known are {', '.join(SOURCES)}")
        return match[1] + rendered(match[2], results) + match[3]

    return MARKED.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where README.md differs")
    args = parser.parse_args()
    text = README.read_text()
    wanted = filled(text)
    if args.check and wanted != text:
        sys.exit("README.md's tables differ from benchmarks/results: run python benchmarks/tables.py")
    if not args.check:
        README.write_text(wanted)


if __name__ == "__main__":
    main()
