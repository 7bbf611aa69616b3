"""The definition itself, in fp64, against torch's own operations and autograd."""

from __future__ import annotations

import pytest
import torch
from heads import small_head

from fastdpo.head import LogitTransform, LoRA
from fastdpo.ops import reference
from fastdpo.ops.engines import engine_of
from fastdpo.ops.problem import FOLDED, Head, Needs, Rows, Tokens, Upstream

TRANSFORMS = [LogitTransform(), LogitTransform(0.7, 0.0, 1.3), LogitTransform(1.2, 4.0, 0.8)]


def logits(leaves, transform: LogitTransform) -> torch.Tensor:
    a, b, scale = leaves.lora
    y = transform.scale * (leaves.hidden @ (leaves.weight + scale * b @ a).T + leaves.bias)
    return (transform.softcap * torch.tanh(y / transform.softcap) if transform.softcap else y) / transform.temperature


@pytest.mark.parametrize("chunk", [1, 1 << 25], ids=["token by token", "whole"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_equals_torch(monkeypatch, transform, chunk):
    monkeypatch.setattr(reference, "LOGITS_BYTES", chunk)
    leaves = small_head(N=9, V=300, H=16, bias=True, lora=True).leaves(torch.float64)
    z = logits(leaves, transform)
    logp = z.log_softmax(1)
    label, entropy = logp.gather(1, leaves.labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    coef, coef_entropy = torch.randn(2, 9, dtype=torch.float64)
    named = leaves.tensors()
    expected = torch.autograd.grad((coef * label + coef_entropy * entropy).sum(), list(named.values()))

    a, b, scale = leaves.lora
    plain = [x.detach() for x in (leaves.hidden, leaves.weight, leaves.bias, a, b)]
    head = Head(*plain[:3], LoRA(*plain[3:], scale), transform, torch.float64)
    tokens = Tokens(leaves.labels, None, None, 9)
    result = reference.forward(head, tokens, stats=frozenset(FOLDED))
    torch.testing.assert_close(result.logps, label.detach())
    torch.testing.assert_close(result.entropy, entropy.detach())
    torch.testing.assert_close(result.mean_logit, z.detach().mean(1))
    torch.testing.assert_close(result.log_sum_sq_probs, (2 * logp.detach()).logsumexp(1))
    assert torch.equal(result.is_top1, z.argmax(1) == leaves.labels)
    needs = Needs(True, True, True, True, True)
    grads = reference.backward(head, tokens, result, Upstream(coef, coef_entropy), None, needs)
    for name, gradient in zip(named, expected):
        torch.testing.assert_close(getattr(grads, name), gradient, msg=name)


def test_serves_fp64_whatever_the_device_has():
    leaves = small_head(N=4, V=40).leaves(torch.float64, False)
    engine = engine_of(leaves.hidden)
    assert engine.name == "reference"
    result = engine.forward(
        Head(leaves.hidden, leaves.weight, compute_dtype=torch.float64), Rows(leaves.labels, -100, 0, 40),
        stats=frozenset(), routing=None,
    )  # fmt: skip
    assert result.logps.dtype == torch.float64
