"""What a kernel costs: counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdpo.costs import kernels
from fastdpo.costs.gpus import Gpu
from fastdpo.costs.kernels import OVERLAPPED, Cost, Epilogue, Tile

NONE = Epilogue(0)
TILE = Tile(128, 256, 64)


def test_a_product_by_hand():
    """256 x 512 by 64: 4 tiles on 3 multiprocessors, two rounds, each reads 128 + 256 rows of 64 numbers of 2 bytes."""
    cost = kernels.product(256, 512, 64, TILE, 3, 2, Epilogue(32, 0))
    assert cost.flops == 2 * 256 * 512 * 64
    assert cost.l2 == 4 * (128 + 256) * 64 * 2
    assert cost.idle == 2 * cost.flops / 4
    assert cost.after == 6 * 128 * 256 * 32 / (32 * kernels.ISSUE) and cost.beside == 0
    assert cost.fills == 2
    ragged = kernels.product(257, 513, 64, TILE, 3, 2, NONE)
    assert ragged.flops == 2 * 384 * 768 * 64  # padding is paid for


def test_multicast_and_overlap():
    shared = kernels.product(256, 512, 64, TILE._replace(multicast=2), 3, 2, OVERLAPPED)
    assert shared.l2 == 4 * (128 + 128) * 64 * 2
    assert shared.after == 0 and shared.fills == 0 and shared.beside > 0
    two = kernels.product(256, 512, 64, TILE._replace(per_sm=2), 3, 2, Epilogue(6, 1))
    assert two.after == 0 and two.beside == shared.beside


def test_exponentials_bound_a_short_epilogue():
    assert Epilogue(1, 1).clocks == 1 / kernels.EXPS
    assert Epilogue(18, 1).clocks == 18 / (32 * kernels.ISSUE)


def test_the_time_of_a_kernel():
    gpu = Gpu(100.0, 10.0, 1.0, l2=50.0, cache=0, multiprocessors=1, boost=1e9, per_clock=1)
    assert gpu.clock == pytest.approx(100 / 0.92)
    cost = Cost(flops=300.0, bytes=20.0, launches=2, l2=100.0, idle=100.0, after=gpu.clock)
    assert cost.floor(gpu) == 3 + 2
    assert cost.expected(gpu) == pytest.approx(4 + 1 + 2)
    assert replace(cost, l2=500.0).expected(gpu) == pytest.approx(10 + 1 + 2)
    assert replace(cost, bytes=500.0).expected(gpu) == pytest.approx(50 + 1 + 2)
    assert replace(cost, after=0.0, beside=9 * gpu.clock).expected(gpu) == pytest.approx(9 + 2)
    assert [replace(cost, **{name: 1e9}).bound(gpu) for name in ("l2", "bytes", "idle")] == ["L2", "memory", "tensor"]


def test_atomics_count_both_ways_and_in_memory_where_the_cache_is_small():
    lengths, tile = torch.tensor([64.0, 32.0, 0.0]), Tile(64, 128, 128)
    sizes = (lengths, 1024, 256, tile, 8, 2, NONE)
    kept, lost = (kernels.routed_dhidden(*sizes, size) for size in (1e9, 0))
    assert kept.l2 == lost.l2 == 2 * 2 * (64 + 128) * 128 * 2 + 8 * 96 * 256
    assert kept.flops == 2 * 128 * 128 * 256
    assert kept.bytes <= lost.bytes
    again = kernels.routed_dhidden(lengths * 100, *sizes[1:], 0)
    assert again.bytes > 8 * 9600 * 256  # more pairs than tokens: rows come and go once per pair
