"""What wrappers are told by: names of torch, DeepSpeed and transformers that are not public. tests/distributed has what
comes of it."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from fastdpo.models.lm_head import refuse_forward
from fastdpo.models.wrappers import gathers, inside_of_tensor_parallel, origin, placed_like, scored_module


def test_hooks_that_gather_are_told_from_others():
    def users(module, args, output):
        return output

    def deepspeeds(module, args, output):
        return output

    deepspeeds.__module__ = "deepspeed.runtime.zero.parameter_offload"
    assert gathers(FSDPState()._post_forward) and gathers(deepspeeds)
    assert not gathers(users) and not gathers(nn.functional.relu) and not gathers(nn.Linear(2, 2))
    assert origin(FSDPParam.__init__) == "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam.__init__"


def test_fsdp1_gathers_in_the_module_around():
    head, outer = nn.Linear(2, 2), nn.Module()
    outer._fsdp_wrapped_module = nn.Module()
    outer._fsdp_wrapped_module._fsdp_wrapped_module = head
    assert scored_module(outer) is head and scored_module(head) is head


def test_the_forward_inside_of_transformers_tensor_parallelism():
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    head, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (head, other):
        own = module.forward if module is head else lambda hidden: 2 * hidden
        module.forward = own
        tensor_parallel.TensorParallelLayer().install_forward(module, None)
        assert module.forward is not own and inside_of_tensor_parallel(module.forward) is own
    refuse_forward(head, nn.Linear)
    with pytest.raises(NotImplementedError, match=r"replaced by .*lambda"):
        refuse_forward(other, nn.Linear)


def test_plain_tensors_are_nowhere():
    x = torch.ones(2)
    assert placed_like(torch.zeros(2), x) is x
