"""What stands before `linear_logps(vocab_group=)` in other people's tensor parallelism, and what it makes of dhidden.

dhidden is summed over the group already. Megatron's regions sum in their backward, or do not:

    copy_to_tensor_model_parallel_region(x)                                     sums: size times too large
    gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)   sums: size times too large
    gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)  slices: right, as NeMo-RL's here
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from heads import SmallHead, relative_error, small_head

import fastdpo
from fastdpo.integrations.nemo_rl import _Gathered

SPLIT = (640, 360)  # rows of the head on each rank


def _all_gather(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _own_rows(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def _summed(x):
    total = x.clone()
    dist.all_reduce(total)
    return total


def _region(forward, backward):
    class Region(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad)

    return Region.apply


REGIONS = {  # (the region, whether each rank holds its own rows before it, what becomes of the gradient)
    "none": (lambda x: x, False, 1),
    "copy": (_region(lambda x: x.view_as(x), _summed), False, 2),
    "gather, gradients scattered": (_region(_all_gather, lambda grad: _own_rows(_summed(grad))), True, 2),
    "gather, gradients split": (_region(_all_gather, _own_rows), True, 1),
    "fastdpo's for NeMo-RL": (lambda x: _Gathered.apply(x, dist.group.WORLD), True, 1),
}


def _grads(rank, size, name, head, coef):
    """Of a layer before the region, of this rank's rows of its input, and of this rank's rows of the head."""
    region, split, _ = REGIONS[name]
    rows = head.weight.split(SPLIT)[rank]
    weight, layer = rows.float().requires_grad_(), torch.eye(head.hidden.shape[1]).requires_grad_()
    given = _own_rows(head.hidden) if split else head.hidden
    x = given.float().requires_grad_()
    logps = fastdpo.linear_logps(region(x @ layer), weight, head.labels, vocab_group=dist.group.WORLD, backward="exact")
    (logps * coef).sum().backward()  # the same loss on every rank, whole: not divided by the ranks
    return x.grad, layer.grad, weight.grad


@pytest.mark.parametrize("name", REGIONS)
def test_what_a_region_makes_of_a_gradient_that_is_summed_already(name, ranks):
    head, coef = small_head(N=36, masked=True), torch.randn(36)
    results = ranks(2)(_grads, name, head, coef)
    _, split, times = REGIONS[name]
    whole = head.leaves(torch.float64)
    layer = torch.eye(head.hidden.shape[1], dtype=torch.float64, requires_grad=True)
    hidden = whole.hidden @ layer
    SmallHead(hidden, whole.weight, whole.labels).logps().mul(coef).sum().backward()
    hidden_grads = [x for x, _, _ in results]
    if split:
        assert relative_error(torch.cat(hidden_grads), times * whole.hidden.grad) < 2e-6
        # each rank has its tokens' part of what lies before: their sum is whole, as Megatron reduces such parameters
        assert relative_error(sum(x for _, x, _ in results), times * layer.grad) < 2e-6
    else:
        for rank in range(2):
            assert relative_error(hidden_grads[rank], times * whole.hidden.grad) < 2e-6
            assert relative_error(results[rank][1], times * layer.grad) < 2e-6
    assert relative_error(torch.cat([x for _, _, x in results]), whole.weight.grad) < 2e-6
