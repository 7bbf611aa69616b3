"""The largest context whose head fits in a GPU's memory, by what each algorithm keeps: a model, nothing is measured.

python -m tools.context [--gib 8 --vocab 128256 --hidden-size 4096] [--output FILE]

Inputs are bf16. Everybody holds the head, its gradient, the hidden states and their gradient; a policy forward and
backward of one preference pair without prompt, so rows are completion tokens. What a peer keeps beside them is read
from its source (releases of November 2026); fastdpo's is the bound that it guarantees, more than it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import inputs

GIB = 2**30
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Kept:
    """Bytes beside head, hidden states and their gradients, for N tokens."""

    bytes: Callable[[int, int, int], float]
    why: str


KEPT = {
    "eager": Kept(lambda n, v, h: 14 * n * v, "14 bytes per logit: bf16, fp32, their log-softmax and gradients"),
    "liger": Kept(lambda n, v, h: 8.5 * n * v, "8.5 bytes per logit of one pair, compiled"),
    "trl": Kept(
        lambda n, v, h: 2 * BF16 * min(n, 4096) * min(v, 32768) + FP32 * (v + n) * h,
        "tiles of 4096 x 32768 and sums of both gradients in fp32",
    ),
    "unsloth": Kept(
        lambda n, v, h: 2 * FP32 * min(n, 4096) * min(v, 16384) + FP32 * v * h, "tiles of 4096 x 16384, fp32"
    ),
    "liger scaled ce": Kept(lambda n, v, h: BF16 * min(n, 1024) * v, "dz of 1024 tokens"),
    "cce": Kept(lambda n, v, h: 3 * FP32 * n, "a few numbers per token"),
    "fastdpo": Kept(lambda n, v, h: 128 * 2**20 + 256 * n, "at most 128 MiB and 256 bytes per token"),
}


def needed(name: str, n: int, v: int, h: int, frozen: bool = False) -> float:
    """Bytes."""
    head = BF16 * v * h * (1 if frozen else 2)
    return head + 2 * BF16 * n * h + KEPT[name].bytes(n, v, h)


def most(name: str, gib: float, v: int, h: int, frozen: bool = False) -> int:
    """Completion tokens."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(name, middle, v, h, frozen) <= gib * GIB else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--gib", type=float, nargs="+", default=[4, 8, 16])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient")
    args = parser.parse_args()
    rows = []
    for name, kept in KEPT.items():
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
