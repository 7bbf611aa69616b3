"""What torch's FlopCounterMode counts of the operators."""

from __future__ import annotations

import pytest
import torch
from heads import peaked_head
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastdpo
from fastdpo.ops import operators
from fastdpo.ops.engines import engine_of

HOW = {"exact": {"backward": "exact"}, "routed": {"tau": (0.05, 0.02), "seed": 2**63 + 9}}


@pytest.mark.parametrize("how", HOW)
def test_kernels_that_no_mode_sees_are_counted_by_formula(monkeypatch, how):
    """The cpu engine stands in for Triton's."""
    head = peaked_head(N=64, V=2048).leaves(torch.float32)
    head.labels[::4] = -100
    monkeypatch.setattr(operators, "engine_of", lambda hidden: engine_of(hidden)._replace(name="triton"))
    with FlopCounterMode(display=False) as counter:
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, **HOW[how])
        *_, bitmap, _, _ = logps.grad_fn.next_functions[0][0].saved_tensors
        forward = counter.get_total_flops()
        logps.sum().backward()
    assert forward == 2 * 48 * head.weight.numel()
    backward = counter.get_total_flops() - forward
    if how == "exact":
        assert backward == 3 * forward
    else:
        pairs = sum(x.bit_count() for x in bitmap[:, :2].flatten().tolist())  # of the larger set
        assert 0 < backward < 3 * forward and backward == 6 * 128 * 64 * pairs


@pytest.mark.parametrize("how", HOW)
def test_flops_of_fake_tensors_are_those_of_all_rows(how):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        hidden, weight = (torch.empty(n, 16, requires_grad=True) for n in (10, 300))
        fastdpo.linear_logps(hidden, weight, torch.zeros(10, dtype=torch.int64), **HOW[how]).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 10 * 300 * 16
