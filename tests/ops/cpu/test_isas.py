"""Every instruction set that the folds are compiled for, on whatever machine this is, against the definition."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head

import fastdpo
from fastdpo.ops import native

ISAS = native.EXTENSION.supported_isas() if native.available() else []


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request, monkeypatch):
    if request.param not in ISAS:
        pytest.skip(f"{request.param} cannot run here")
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    before = native.EXTENSION.isa()
    assert native.EXTENSION.use_isa(request.param)
    yield request.param
    native.EXTENSION.use_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("options", [{"backward": "exact"}, {"tau": 0.0, "seed": 1}], ids=["exact", "routed"])
def test_values_and_gradients(isa, options, softcap, dtype):
    assert native.EXTENSION.isa() == isa
    head = small_head(N=19, V=1000, H=23, bias=True, lora=True, masked=True)
    leaves, expected = head.leaves(dtype), head.rounded(dtype)
    stats = fastdpo.linear_token_stats(
        leaves.hidden, leaves.weight, leaves.labels, leaves.bias, lora=leaves.lora, softcap=softcap, **options
    )
    expected_logps = expected.logps(softcap=softcap)
    torch.testing.assert_close(stats.logps.double(), expected_logps, rtol=1e-5, atol=3e-6)
    logp = expected.logits(softcap=softcap).detach().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1) * (head.labels != -100)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=4e-6)
    stats.logps.sum().backward()
    expected_logps.sum().backward()
    for name, x in leaves.tensors().items():
        wanted = expected.tensors()[name].grad
        assert relative_error(x.grad, wanted) < max(5e-6, 2 * relative_error(wanted.to(dtype), wanted)), name


@pytest.mark.parametrize("x", [0.0, -0.0, -1e-30, -20.0, -87.0, -88.0, -104.0, -1e4, float("-inf"), float("nan")])
def test_probabilities_at_the_ends_of_exp(isa, x):
    """Two logits, 0 and x: p = (1, e^x) / (1 + e^x); exp(-inf) is exactly 0 and NaN passes through."""
    logits = torch.tensor([[0.0, x]], requires_grad=True)
    logps = fastdpo.selective_log_softmax(logits, torch.tensor([0]))
    logps.sum().backward()
    expected = torch.tensor([[0.0, x]], dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(logps.double(), expected[:, 0], rtol=1e-6, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(logits.grad[0, 1].double(), -expected[0, 1].exp(), rtol=1e-6, atol=2e-38, equal_nan=True)
