"""A head that TRL reads and never calls, called here. On ranks: distributed/test_trl.py."""

import pytest
import torch
from torch import nn

from fastdpo.integrations.trl_head import (
    in_forward_of,
    is_of_fsdp,
    refuse_unreduced,
    regathering,
    split_head,
    telling_its_head,
    telling_its_student,
)
from fastdpo.ops.divergence.problem import DivergenceOutput
from fastdpo.ops.problem import TokenStats


def score(hidden, weight, bias):
    z = (hidden @ weight.T + bias).log_softmax(-1)
    return TokenStats(z[:, 0], None, z.detach().mean(-1), None, None)


@pytest.mark.parametrize("own_forward", [False, True])
def test_scoring_runs_the_hooks_of_the_head_and_leaves_its_forward(own_forward):
    head, seen = nn.Linear(8, 20), []
    if own_forward:
        head.forward = own = lambda x: x
    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))  # as FSDP's, which casts and gathers
    head.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden = torch.randn(5, 8)
    stats, right = in_forward_of(head, hidden, score), score(2 * hidden, head.weight, head.bias)
    assert torch.equal(stats.logps, right.logps) and torch.equal(stats.mean_logit, right.mean_logit)
    ((handed,),) = seen  # what takes a gradient and nothing else
    assert handed is stats.logps and not handed._is_view()
    assert head.__dict__.get("forward") is (own if own_forward else None)
    for mine, other in zip(*[torch.autograd.grad(x.logps.sum(), [head.weight, head.bias]) for x in (stats, right)]):
        assert torch.equal(mine, other)


def test_a_failing_score_leaves_the_forward():
    head = nn.Linear(8, 20)
    with pytest.raises(ZeroDivisionError):
        in_forward_of(head, torch.randn(5, 8), lambda *_: 1 / 0)
    assert "forward" not in head.__dict__


def test_only_split_heads_are_told():
    class FSDPModule(nn.Linear):  # told by its name
        pass

    class Model(nn.Module):
        def get_output_embeddings(self):
            return self.head

    def fused(self, x):
        """TRL's."""
        return split_head()

    def theirs(model, suffix):
        model.forward = fused.__get__(model)
        model.suffix = suffix

    for kind in (nn.Linear, FSDPModule):
        model = Model()
        model.head = kind(2, 3)
        telling_its_head(theirs, None)(model, suffix="s")
        assert model.suffix == "s" and model.forward.__doc__ == "TRL's."
        assert is_of_fsdp(model.head) == (kind is FSDPModule)
        assert model(1) is (model.head if kind is FSDPModule else None) and split_head() is None


def test_what_a_head_gives_is_any_named_tuple():
    head, hidden = nn.Linear(8, 20), torch.randn(5, 8)

    def score(hidden, weight, bias):
        z = hidden @ weight.T + bias
        return DivergenceOutput(z.square().sum(-1), None, None, z.detach().sum(-1))

    found = in_forward_of(head, hidden, score)
    assert type(found) is DivergenceOutput and found.entropy is None
    assert torch.equal(found.divergence, score(hidden, head.weight, head.bias).divergence)
    assert found.divergence.requires_grad and not found.ref_logps.requires_grad


def test_the_student_s_head_is_told():
    class FSDPModule(nn.Linear):  # told by its name
        pass

    class Student:
        def __init__(self, head):
            self.get_output_embeddings = lambda: head

    class Trainer:
        def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch=None):
            return split_head(), inputs, num_items_in_batch

    compute_loss = telling_its_student(Trainer._compute_loss, None)
    plain, split = nn.Linear(2, 3), FSDPModule(2, 3)
    assert compute_loss(Trainer(), Student(plain), 1, 2) == (None, 1, 2)
    assert compute_loss(Trainer(), Student(split), 1, num_items_in_batch=2) == (split, 1, 2)
    assert split_head() is None


class _ToTorchTensor(torch.autograd.Function):  # as torch names what gathers a DTensor
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gathered_head_that_nobody_told_of_is_refused(dtype):
    weight = nn.Parameter(torch.ones(3, 2))
    gathered = _ToTorchTensor.apply(weight).to(dtype)  # TRL casts a head to the type of hidden
    with pytest.raises(NotImplementedError, match="call patch_trl first"):
        refuse_unreduced(gathered)
    with torch.no_grad():
        refuse_unreduced(gathered)
    for fine in (weight, weight.detach(), weight.to(dtype), weight * 2):
        refuse_unreduced(fine)


def test_regathering_leaves_what_is_whole_alone():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    x = torch.arange(3.0, requires_grad=True)
    (grad,) = torch.autograd.grad(regathering(Square).apply(x).sum(), x)
    assert torch.equal(grad, 2 * x)
