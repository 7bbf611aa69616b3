"""GPUs that nobody tuned this library for: what serves them, whose tiles they get, and how well by the cost model.

python -m tools.cards --head head.safetensors [--shape 4096 128256 2048] [--docs docs/cards.md]

No GPU is needed, and nothing is measured. Rates are estimated from data sheets by one rule (`estimated`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks import inputs
from fastdpo.costs.gpus import GPUS, MULTIPROCESSORS, Gpu
from fastdpo.costs.steps import Shape
from fastdpo.head import taus
from fastdpo.ops.engines import OLDEST_GPU
from fastdpo.ops.triton.launch import Target
from tools import cost_tables
from tools.count_step import write_docs
from tools.live import live_pairs


@dataclass(frozen=True)
class Sheet:
    """What a data sheet says: multiprocessors, clock, dense bf16 operations of one and clock, bytes/s, bytes of L2."""

    capability: int
    multiprocessors: int = 0
    boost: float = 0.0
    per_clock: int = 0
    bandwidth: float = 0.0
    l2_size: float = 0.0


L2_BYTES_PER_CLOCK = GPUS["RTX 4090"].l2 / (GPUS["RTX 4090"].multiprocessors * GPUS["RTX 4090"].boost)
CARDS = {
    "V100": Sheet(70),
    "T4": Sheet(75),
    "A10": Sheet(86, 72, 1.695e9, 1024, 600e9, 6e6),
    "RTX 3060": Sheet(86, 28, 1.777e9, 512, 360e9, 3e6),
    "RTX 3090": Sheet(86, 82, 1.695e9, 512, 936e9, 6e6),
    "Jetson Orin": Sheet(87),
    "L4": Sheet(89, 58, 2.04e9, 1024, 300e9, 48e6),
    "RTX 4060 Laptop": Sheet(89, 24, 2.37e9, 512, 256e9, 32e6),
    "H20": Sheet(90, 78, 1.98e9, 960, 4.0e12, 60e6),
    "B300": Sheet(103),
    "Jetson Thor": Sheet(110),
    "RTX PRO 6000 (Blackwell)": Sheet(120, 188, 2.6e9, 1024, 1.79e12, 128e6),
    "DGX Spark": Sheet(121),
}


def estimated(sheet: Sheet) -> Gpu:
    """85% of the data sheet's operations, 90% of its bytes, 80% of its L2, which moves as many bytes per clock and
    multiprocessor as an RTX 4090's."""
    peak = sheet.multiprocessors * sheet.boost * sheet.per_clock
    l2 = L2_BYTES_PER_CLOCK * sheet.multiprocessors * sheet.boost
    return Gpu(0.85 * peak, 0.9 * sheet.bandwidth, 2e-6, l2, 0.8 * sheet.l2_size, sheet.multiprocessors, sheet.boost,
               sheet.per_clock, sheet.capability)  # fmt: skip


def row(name: str, sheet: Sheet, shape: Shape, live) -> list[str]:
    capability = sheet.capability
    card = [name, f"{capability // 10}.{capability % 10}"]
    if (capability // 10, capability % 10) < OLDEST_GPU:
        return [*card, "`reference`: plain torch, chunk by chunk", "", "", "", ""]
    compiled = "by `make launches`" if capability in MULTIPROCESSORS else "never"
    served = [*card, "`triton`", f"sm_{Target(capability, 1).tiles}", compiled]
    if not sheet.multiprocessors:
        return [*served, "", ""]
    gpu = estimated(sheet)
    one, target = shape.one_pass / gpu.flops, (shape, None, None, gpu, "plain")
    forward = cost_tables.costs(*target, frozen=True, backward="exact", parts=("reference",)).expected(gpu) / one
    step = cost_tables.costs(shape, *live, gpu, "plain", frozen=False, backward="routed").expected(gpu) / (2 * one)
    return [*served, f"{forward:.2f}", f"{step:.2f} of {2e3 * one:.0f} ms"]


def table(head, shape: Shape) -> list[str]:
    live = [live_pairs(head, shape, t, "same") for t in (min(taus(None, True)), taus(None, True)[0])]
    header = ["card", "capability", "served by", "tiles of", "compiled", "forward", "step"]
    rows = [row(name, sheet, shape, live) for name, sheet in CARDS.items()]
    return list(cost_tables.markdown(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--shape", type=int, nargs=3, default=(4096, 128256, 2048))
    parser.add_argument("--docs", type=Path, help="write the table into this file, docs/cards.md")
    args = parser.parse_args()
    lines = table(inputs.load(args.head), Shape(*args.shape))
    if args.docs:
        write_docs(args.docs, {"cards": lines})
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
