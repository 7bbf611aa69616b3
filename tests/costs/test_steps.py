"""A step's counts, from recorded launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastdpo.costs.gpus import GPUS, Gpu
from fastdpo.costs.kernels import OVERLAPPED, Epilogue
from fastdpo.costs.steps import Shape, step_cost
from fastdpo.ops.triton.launch import Target

H100 = GPUS["H100"]


def target(gpu: Gpu):
    return Target(gpu.capability, gpu.multiprocessors)


def routed(shape: Shape, live, gpu: Gpu = H100, **options):
    options = {"frozen": False, "backward": "routed", "tau": None, "target": target(gpu), "cache": gpu.cache} | options
    return step_cost(shape, live, live, **options)


@pytest.mark.parametrize("name", GPUS)
def test_expected_times_are_not_below_the_floor(name):
    gpu, shape = GPUS[name], Shape(2048, 32000, 2048)
    live = torch.full((250,), 200.0)
    step = routed(shape, live, gpu)
    assert step.floor(gpu) < step.expected(gpu) < 3 * step.floor(gpu)
    for kernel in step.kernels.values():
        assert kernel.floor(gpu) <= kernel.expected(gpu)


def test_a_better_fold_is_an_earlier_end():
    shape, live = Shape(4096, 32000, 1024), torch.full((250,), 300.0)
    times = [
        routed(shape, live, fold=fold, multicast=multicast).expected(H100)
        for fold, multicast in ((Epilogue(18, 1), 1), (None, 1), (OVERLAPPED, 1), (OVERLAPPED, 2))
    ]
    assert times == sorted(times, reverse=True) and times[0] > times[2]


@pytest.mark.parametrize("frozen", [False, True])
def test_counted_costs_follow_the_live_pairs(frozen):
    shape, options = Shape(4096, 32000, 2048), {"frozen": frozen, "tau": None, "target": Target(90, 132)}
    few, many = (
        step_cost(shape, live, live, backward="routed", **options)
        for live in (torch.full((250,), 64.0), torch.full((250,), 640.0))
    )
    exact = step_cost(shape, None, None, backward="exact", **options)
    gpu = GPUS["H200"]
    assert 2.0 <= few.total().flops / shape.one_pass < many.total().flops / shape.one_pass < 3.0
    # padding of ragged tiles comes on top of whole passes: 4 with a frozen head, 5 in a joint sweep, 6 in two
    assert (4 if frozen else 5) <= exact.total().flops / shape.one_pass < (4.3 if frozen else 6.4)
    assert few.floor(gpu) < many.floor(gpu) < exact.floor(gpu)
    forward = step_cost(shape, None, None, backward="exact", parts=("reference",), **options)
    backward = step_cost(shape, None, None, backward="exact", parts=("backward",), **options)
    parts = 2 * forward.total().flops + backward.total().flops
    assert parts == pytest.approx(exact.total().flops, rel=1e-6)
