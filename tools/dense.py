"""What the routed backward would cost if blocks that many tokens keep went through dense products.

A block is dense where more than a fraction f of the tokens keep it: then dz of all tokens, dz @ weight and
dz.T @ hidden over its columns, in the exact kernels' tiles: no gathers, no lists, no atomics, and fp32 sums of dhidden
that are read and written once per slab. The rest goes through the routed kernels. Sizes only: no launch is recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.costs import kernels as kernel_costs
from fastdpo.costs.gpus import Gpu
from fastdpo.costs.kernels import BLOCK, Cost, Tile
from fastdpo.costs.steps import Shape

FRACTIONS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)


@dataclass(frozen=True)
class Plan:
    """How a backward would be done; as it is by default."""

    dense: float = 1.0  # blocks that more than this share of the tokens keep go through dense products
    pair_tile: int | None = None  # pairs of a work tile,
    long: int = 0  # of lists of so many pairs
    sums: int | None = None  # bytes of fp32 dhidden of a range of tokens


class Sweep(NamedTuple):
    tokens: int
    hidden: bool
    head: bool


def sweeps(shape: Shape, frozen: bool, sums: int | None = None) -> list[Sweep]:
    """As fastdpo/ops/triton/sweep.py makes them."""
    from fastdpo.ops.triton import memory

    n, h, item = shape.num_tokens, shape.hidden_size, shape.dtype.itemsize
    size, joint = memory.range_size(n, item, 4 * h)
    if sums is not None and size * 4 * h > sums:
        size, joint = memory.multiple(sums // (4 * h), BLOCK), False
    joint = joint and not frozen
    found = [Sweep(min(size, n - first), True, joint) for first in range(0, n, size)]
    return found if joint or frozen else [*found, Sweep(n, False, True)]


@dataclass
class Backward:
    """Costs by kernel, the dense blocks, and the share of pairs in them."""

    kernels: dict[str, Cost]
    blocks: int
    share: float

    def expected(self, gpu: Gpu) -> float:
        return sum(cost.expected(gpu) for cost in self.kernels.values())


def slabs_of(columns: int, tokens: int, item: int, held: int) -> list[int]:
    """Columns of each slab whose dz fits beside `held` bytes."""
    from fastdpo.ops.triton import memory

    room = max(memory.WORKSPACE - held, memory.LEAST_DZ)
    count = math.ceil(columns * tokens * item / room)
    width = BLOCK * math.ceil(columns / BLOCK / count)
    return [min(width, columns - first) for first in range(0, columns, width)]


def backward(shape: Shape, live: Tensor, gpu: Gpu, plan: Plan = Plan(), *, frozen: bool = False) -> Backward:
    """The products of a backward of which `live` [blocks] tokens keep each block: dz of both sweeps where there are
    two. Lists, bitmaps and copies of rows are left out, which do not change."""
    from fastdpo.ops.triton.launch import Target, tile

    target, h, item = Target(gpu.capability, gpu.multiprocessors), shape.hidden_size, shape.dtype.itemsize

    def form(kernel: str, m: int | None = None) -> Tile:
        found = tile(kernel, target, "half")
        return Tile(m or found.m, found.n, found.k, found.group, found.per_sm)

    epilogues, short = kernel_costs.epilogues(gpu.capability), form("routed_dz").m
    heavy = live > plan.dense * shape.num_tokens
    columns, light = BLOCK * int(heavy.sum()), torch.where(heavy, 0.0, live)
    kernels: dict[str, Cost] = {}

    def add(name: str, sizes: tuple, m: int | None = None, **more) -> None:
        cost = getattr(kernel_costs, name)(*sizes, h, form(name, m), gpu.multiprocessors, item, epilogues[name], **more)
        cost.launches = 1
        kernels.setdefault(name, Cost())
        kernels[name] += cost

    for sweep in sweeps(shape, frozen, plan.sums):
        n = sweep.tokens
        lengths = (light * (n / shape.num_tokens)).ceil()
        wanted = {"dz": True, "dhidden": sweep.hidden, "dweight": sweep.head}
        wanted = [name for name, is_wanted in wanted.items() if is_wanted]
        for name in wanted if lengths.sum() > 0 else ():
            if name == "dweight":
                add("routed_dweight", (lengths, n), cache=gpu.cache)
                continue
            is_long = lengths >= plan.long
            for lists, m in ((is_long, plan.pair_tile or short), (~is_long, short)):
                if (lengths * lists).sum() > 0:
                    add(f"routed_{name}", (lengths * lists, n), m, cache=gpu.cache)
        held = n * 4 * h if sweep.hidden else 0
        for width in slabs_of(columns, n, item, held) if columns else ():
            for name in wanted:
                add(name, (n, width))
    return Backward(kernels, int(heavy.sum()), (live[heavy].sum() / live.sum()).item())


PLANS = {
    "as it is": Plan(),
    "tiles of 128 pairs": Plan(pair_tile=128),
    "tiles of 128 for lists from 256 on": Plan(pair_tile=128, long=256),
    "sums of 32 MB": Plan(sums=32 << 20),
    **{f"dense > {f:g}": Plan(dense=f) for f in FRACTIONS},
    "dense > 0.5, tiles of 128 from 256 on": Plan(0.5, 128, 256),
    "the same, sums of 32 MB": Plan(0.5, 128, 256, 32 << 20),
}


def rows(shape: Shape, live: Tensor, gpus: dict[str, Gpu], *, frozen: bool) -> list[list[str]]:
    """Per plan: dense blocks, share of the pairs in them, the backward's products over two plain products."""
    found = []
    for name, plan in PLANS.items():
        costs = {gpu: backward(shape, live, rates, plan, frozen=frozen) for gpu, rates in gpus.items()}
        one = next(iter(costs.values()))
        over = [f"{costs[gpu].expected(rates) / (2 * shape.one_pass / rates.flops):.3f}" for gpu, rates in gpus.items()]
        found.append([name, str(one.blocks), f"{100 * one.share:.0f}%", *over])
    return found
