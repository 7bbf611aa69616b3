"""A head that TRL reads and never calls, called here. On ranks: distributed/test_trl.py."""

import pytest
import torch
from torch import nn

from fastdpo.integrations.trl_head import in_forward_of, is_of_fsdp, split_head, telling_its_head
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
