"""The largest context whose head fits in a GPU's memory, by what each algorithm keeps: a model, nothing is measured.

python -m tools.context [--gib 8 --vocab 128256 --hidden-size 4096] [--output FILE]

Inputs are bf16. Everybody holds the head, its gradient, the hidden states and their gradient; a policy forward and
backward of one preference pair without prompt, so rows are completion tokens. What most of them keep beside these is
in `fastdpo/costs/memory.py`, and here those that `python -m fastdpo plan` leaves out, read from their sources (releases
of November 2026); fastdpo's is the bound that it guarantees, more than it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import inputs
from fastdpo.costs import memory
from fastdpo.costs.memory import FP32, GIB, PATHS, Batch, most_tokens

BF16 = 2


@dataclass(frozen=True)
class Kept:
    """Bytes beside head, hidden states and their gradients, for N tokens."""

    bytes: Callable[[int, int, int], float]
    why: str


PLANNED = {"eager": "eager", "liger": "liger", "trl": "trl", "fastdpo": "fastdpo routed"}  # in PATHS
KEPT = {
    "unsloth": Kept(
        lambda n, v, h: 2 * FP32 * min(n, 4096) * min(v, 16384) + FP32 * v * h, "tiles of 4096 x 16384, fp32"
    ),
    "liger scaled ce": Kept(lambda n, v, h: BF16 * min(n, 1024) * v, "dz of 1024 tokens"),
    "cce": Kept(lambda n, v, h: 3 * FP32 * n, "a few numbers per token"),
}
NAMES = ("eager", "liger", "trl", *KEPT, "fastdpo")


def needed(name: str, n: int, v: int, h: int, frozen: bool = False) -> float:
    """Bytes."""
    if name in PLANNED:
        return memory.peak(PLANNED[name], Batch(n, v, h, BF16, frozen=frozen, reference=False))
    head = BF16 * v * h * (1 if frozen else 2)
    return head + 2 * BF16 * n * h + KEPT[name].bytes(n, v, h)


def most(name: str, gib: float, v: int, h: int, frozen: bool = False) -> int:
    """Completion tokens."""
    return most_tokens(lambda n: needed(name, n, v, h, frozen) <= gib * GIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--gib", type=float, nargs="+", default=[4, 8, 16])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient")
    args = parser.parse_args()
    rows = []
    for name in NAMES:
        kept = PATHS[PLANNED[name]] if name in PLANNED else KEPT[name]
        fits = {f"{gib:g} GiB": most(name, gib, args.vocab, args.hidden_size, args.frozen) for gib in args.gib}
        rows.append({"path": name, **fits, "kept": kept.why})
    notes = {
        "V": args.vocab,
        "H": args.hidden_size,
        "dtype": "bfloat16",
        "head": "frozen" if args.frozen else "trained",
    }
    inputs.report(args.output, "Most completion tokens that fit, by the cost model", rows, notes | {"measured": False})


if __name__ == "__main__":
    main()
