"""Cycles per logit of each fold of csrc, for every instruction set that this processor has, on one thread.

python -m benchmarks.cpu.folds [--rows 512] [--rounds 9] [--output folds.json]

`tile` is a tile of TILE_BYTES, as a call has it; `cached` is the same fold of one row again and again, which never
leaves the first-level cache: what its arithmetic takes, and what it cannot be faster than on any tile. `read` is the
tile read and nothing computed (torch's largest element of each row). A cycle is one of a chain of dependent additions,
each of which takes one on every processor that is supported; cc compiles it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import inputs
from fastdpo.ops.cpu.operands import TILE_BYTES
from fastdpo.ops.native import EXTENSION

CHAIN = """
unsigned long chain(unsigned long n) {
  unsigned long x = 0;
  for (; n; n -= 16) {
    #define ONE x += 1; __asm__ volatile("" : "+r"(x));
    ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE ONE
  }
  return x;
}
"""
ADDITIONS = 1 << 22  # a millisecond
CACHED = 1024, 2048  # rows of so many logits: 8 KiB


def clock() -> Callable[[], float]:
    """Cycles per second, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "chain.c"), Path(folder, "chain.so")
        source.write_text(CHAIN)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        chain = ctypes.CDLL(str(library)).chain
    chain.argtypes, chain.restype = [ctypes.c_ulong], ctypes.c_ulong

    def measured() -> float:
        begin = time.perf_counter()
        chain(ADDITIONS)
        return ADDITIONS / (time.perf_counter() - begin)

    return measured


def folds(rows: int, columns: int, cached: bool) -> dict[str, Callable[[], None]]:
    """Each fold of [rows, columns] logits; `cached`: every row is the same memory."""

    def logits() -> torch.Tensor:
        z = torch.randn(1 if cached else rows, columns) * 3
        return z.as_strided((rows, columns), (0 if cached else columns, 1))

    labels = torch.randint(columns, (rows,))
    lse, logps = torch.full((rows,), 13.0), torch.full((rows,), -5.0)
    entropy, one = torch.full((rows,), 3.0), torch.ones(rows)
    blocks = -(-columns // 128)
    block_lse = torch.empty(rows, blocks, dtype=torch.float64)
    no_stats = torch.tensor(EXTENSION.NO_ROW_STATS, dtype=torch.float64).repeat(rows, 1)
    pair_sums = torch.empty(rows, blocks * EXTENSION.BLOCK_DIVERGENCE_SIZE, dtype=torch.float64)
    of_labels = torch.empty(2, rows)
    plain, capped = ((1.0, softcap, 1.0) for softcap in (0.0, 30.0))
    tile, ref = logits(), logits()

    def columns_of(transform) -> dict:
        return {"data": tile, "col_start": 0, "bias": None, "transform": transform}

    of_ref = {"ref_data": ref, "ref_bias": None, "ref_transform": plain}

    def fold(transform, stats=None):
        EXTENSION.fold(
            **columns_of(transform),
            labels=labels,
            block_lse=block_lse,
            label_logit=of_labels[0],
            stats=stats,
            num_threads=1,
        )

    def pair_fold(*masses):
        EXTENSION.divergence_fold(
            **columns_of(plain),
            **of_ref,
            labels=labels,
            blocks=pair_sums,
            label_logit=of_labels[0],
            ref_label_logit=of_labels[1],
            lse=masses[0] if masses else None,
            ref_lse=masses[1] if masses else None,
            beta=0.5,
            num_threads=1,
        )

    def grad(transform, of_entropy=None):
        EXTENSION.grad(
            **columns_of(transform),
            tokens=None,
            labels=labels,
            lse=lse,
            logps=logps,
            coef=one,
            entropy=None if of_entropy is None else entropy,
            coef_entropy=of_entropy,
            coef_lse=None,
            num_threads=1,
        )

    found = {
        "log-probs": lambda: fold(plain),
        "log-probs, softcap": lambda: fold(capped),
        "statistics": lambda: fold(plain, no_stats),
        "KL of two heads": pair_fold,
        "JSD of two heads": lambda: pair_fold(lse.double(), lse.double()),
    }
    if not cached:  # these write their tile, whose rows are then apart
        found["dz"] = lambda: grad(plain)
        found["dz, entropy"] = lambda: grad(plain, one)
        found["read"] = lambda: torch.amax(tile, 1)
    return found


def measure(isa: str, rows: int, columns: int, rounds: int, cycles: Callable[[], float]) -> list[dict]:
    EXTENSION.use_isa(isa)
    places = {"tile": folds(rows, columns, False), "cached": folds(CACHED[0], CACHED[1], True)}
    sizes = {"tile": rows * columns, "cached": CACHED[0] * CACHED[1]}
    taken: dict[tuple[str, str], list[float]] = {}
    for round_index in range(-1, rounds):
        for place, of_place in places.items():
            for name, run in of_place.items():
                before = cycles()
                begin = time.perf_counter()
                run()
                seconds = time.perf_counter() - begin
                if round_index >= 0:  # the first round warms up
                    taken.setdefault((name, place), []).append(seconds * (before + cycles()) / 2 / sizes[place])
    return [
        {"isa": isa, "fold": name, "logits": place, "cycles": statistics.median(found)}
        for (name, place), found in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns, cycles, best = TILE_BYTES // 4 // args.rows, clock(), EXTENSION.isa()
    found = []
    try:
        for isa in EXTENSION.supported_isas():
            found += measure(isa, args.rows, columns, args.rounds, cycles)
    finally:
        EXTENSION.use_isa(best)
    inputs.report(args.output, "Cycles per logit of each fold, one thread", found, {"tile": [args.rows, columns]})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
