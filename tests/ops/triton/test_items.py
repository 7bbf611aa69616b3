"""Items in the order in which programs take them: each sees what it waits for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton_case import DEVICE

from fastdpo.ops.triton import items


@triton.jit
def relay_kernel(counters, values, out, SOURCES: tl.constexpr, TOTAL: tl.constexpr, N: tl.constexpr):
    """The first SOURCES items write N numbers each, the rest add all of them up."""
    item = items.take(counters)
    i = tl.arange(0, N)
    while item < TOTAL:
        if item < SOURCES:
            tl.store(values + item * N + i, item + i)
            items.finished(counters + 1)
        else:
            items.wait(counters + 1, SOURCES)
            total = tl.zeros((N,), tl.int32)
            for source in range(SOURCES):
                total += tl.load(values + source * N + i)
            tl.store(out + (item - SOURCES) * N + i, total)
        item = items.take(counters)


def test_items_see_the_ones_they_wait_for():
    """Fewer programs than items, and more."""
    sources, n = 37, 128
    for programs in (1, 3, 500):
        counters = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        values, out = (torch.full((k, n), -1, dtype=torch.int32, device=DEVICE) for k in (sources, 100))
        relay_kernel[(programs,)](counters=counters, values=values, out=out, SOURCES=sources, TOTAL=sources + 100, N=n)
        expected = torch.arange(n, dtype=torch.int32) * sources + sources * (sources - 1) // 2
        assert torch.equal(out.cpu(), expected.expand(100, n))
        assert counters.tolist() == [sources + 100 + programs, sources]
