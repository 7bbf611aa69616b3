"""How far more threads than this machine has could share csrc's work of one backward and its forward.

python -m benchmarks.cpu.threads [--head head.safetensors] [--hidden-size 1024] [--threads 1 2 4 8 64]

A call of the extension is one parallel loop over pieces, and one barrier at its end. With as many threads as asked for
it is cut into the pieces that it would have there; `busy` is the part of the threads' time that has a piece to do if
pieces take equally long, weighted by what each call takes on one thread. A library's products are its own.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch

import fastdpo
from benchmarks import inputs
from fastdpo.ops.native import EXTENSION

PIECES = EXTENSION.pieces_of_last_loop


class Loops:
    """Each call of the extension's functions that take `num_threads`: (name, seconds, pieces)."""

    def __init__(self, threads: int):
        self.threads, self.found, self.replaced = threads, [], {}

    def __enter__(self) -> Loops:
        for name in dir(EXTENSION):
            function = getattr(EXTENSION, name)
            if callable(function) and not name.startswith("_"):
                self.replaced[name] = function
                setattr(EXTENSION, name, self._timed(name, function))
        return self

    def __exit__(self, *_) -> None:
        for name, function in self.replaced.items():
            setattr(EXTENSION, name, function)

    def _timed(self, name: str, function):
        def call(*given, **fields):
            if "num_threads" not in fields:
                return function(*given, **fields)
            fields["num_threads"] = self.threads
            begin = time.perf_counter()
            result = function(*given, **fields)
            self.found.append((name, time.perf_counter() - begin, PIECES()))
            return result

        return call


def loops(backward: str, threads: int, hidden, weight, labels) -> list[tuple[str, float, int]]:
    with Loops(threads) as seen:
        options = {"backward": "exact"} if backward == "exact" else {"seed": 1}
        fastdpo.linear_logps(hidden, weight, labels, **options).sum().backward()
    hidden.grad = weight.grad = None
    return seen.found


def busy(pieces: int, threads: int) -> float:
    return pieces / (threads * -(-pieces // threads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4, 8, 64])
    args = parser.parse_args()
    head = inputs.lifted(inputs.load(args.head), args.hidden_size)
    leaves = [x.clone().requires_grad_() for x in (head.hidden, head.weight)]
    torch.set_num_threads(1)
    rows = []
    for backward in ("routed", "exact"):
        loops(backward, 1, *leaves, head.labels)  # warms up
        alone = loops(backward, 1, *leaves, head.labels)
        for threads in args.threads:
            found, total, of_threads = loops(backward, threads, *leaves, head.labels), 0.0, 0.0
            fewest: dict[str, int] = defaultdict(lambda: 1 << 62)
            for (name, seconds, _), (_, _, pieces) in zip(alone, found, strict=True):
                total, of_threads = total + seconds, of_threads + seconds / max(busy(pieces, threads), 1e-9)
                fewest[name] = min(fewest[name], pieces)
            least = min(fewest, key=fewest.get)
            row = {"backward": backward, "threads": threads, "barriers": len(found), "csrc, s of one thread": total}
            rows.append({**row, "busy": total / of_threads, "fewest pieces": fewest[least], "of": least})
            print(rows[-1], flush=True)
    notes = {"tokens": len(head.labels), "V": head.weight.shape[0], "H": args.hidden_size, "head": head.name}
    inputs.report(args.output, "csrc's loops of a forward and its backward, by number of threads", rows, notes)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
