"""logits -> logps against torch's log_softmax."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error

import fastdpo

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}


def definition(logits, index, temperature):
    logps = (logits.double() / temperature).log_softmax(-1)
    several = index.ndim == logits.ndim
    picked = logps.gather(-1, index.clamp(min=0) if several else index.clamp(min=0)[..., None])
    picked = picked if several else picked[..., 0]
    return torch.where(index == -100, torch.zeros_like(picked), picked)


@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("shape", [(3, 5, 1000), (7, 333), (2, 2, 1), (4, 128)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_definition(engine, dtype, shape, columns):
    logits = (torch.randn(shape) * 4).to(dtype).requires_grad_()
    index = torch.randint(0, shape[-1], shape[:-1] + ((columns,) if columns else ()))
    index.view(-1)[1] = -100
    dlogps = torch.randn(index.shape, dtype=torch.float64)
    logps = fastdpo.selective_log_softmax(logits, index, temperature=0.7)
    logps.backward(dlogps.to(logps.dtype))
    oracle = logits.detach().double().requires_grad_()
    expected = definition(oracle, index, 0.7)
    expected.backward(dlogps)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=4e-6)
    if shape[-1] > 1:
        assert relative_error(logits.grad, oracle.grad) < TOLERANCE[dtype]


def test_index_named_twice_in_a_row(engine):
    logits = torch.randn(2, 9, requires_grad=True)
    index = torch.tensor([[3, 3, -100], [0, 8, 0]])
    fastdpo.selective_log_softmax(logits, index).sum().backward()
    oracle = logits.detach().double().requires_grad_()
    definition(oracle, index, 1.0).sum().backward()
    assert relative_error(logits.grad, oracle.grad) < 2e-6


def test_strided_logits(engine):
    base = torch.randn(6, 2 * 700)
    logits, index = base[:, ::2], torch.randint(0, 700, (6,))
    logps = fastdpo.selective_log_softmax(logits, index)
    torch.testing.assert_close(logps.double(), definition(logits, index, 1.0), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_is_equal_and_guarded(engine, dtype):
    leaf = torch.randn(4, 6, 500).to(dtype).requires_grad_()
    index = torch.randint(0, 500, (4, 6))
    dlogps = torch.randn(4, 6)
    plain = torch.autograd.grad((fastdpo.selective_log_softmax(leaf * 1, index) * dlogps).sum(), leaf)[0]
    logits = leaf * 1
    version = logits._version
    logps = fastdpo.selective_log_softmax(logits, index, inplace_backward=True)
    loss = (logps * dlogps).sum()
    inplace = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(plain, inplace)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_masked_and_invalid_rows(engine):
    logits = torch.randn(5, 40)
    logits[1] = torch.nan
    logits.requires_grad_()
    logps = fastdpo.selective_log_softmax(logits, torch.tensor([3, -100, 40, -1, 0]))
    logps.sum().backward()
    assert logps[1] == 0 and (logits.grad[1] == 0).all()
    assert torch.isnan(logps[2:4]).all() and torch.isnan(logits.grad[2:4]).all()
    assert torch.isfinite(logps[[0, 4]]).all() and torch.isfinite(logits.grad[[0, 4]]).all()


def test_empty(engine):
    logits = torch.randn(0, 7, requires_grad=True)
    fastdpo.selective_log_softmax(logits, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert logits.grad.shape == (0, 7)


BAD = {
    "logits int": (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        {},
        TypeError,
        "logits",
    ),
    "index float": (torch.zeros(2, 3), torch.zeros(2), {}, TypeError, "index"),
    "index shape": (torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64), {}, ValueError, r"\(4,\)"),
    "no columns": (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), {}, ValueError, "V > 0"),
    "temperature": (
        torch.zeros(2, 3),
        torch.zeros(2, dtype=torch.int64),
        {"temperature": -1.0},
        ValueError,
        "-1.0",
    ),
    "leaf in place": (
        torch.zeros(2, 3, requires_grad=True),
        torch.zeros(2, dtype=torch.int64),
        {"inplace_backward": True},
        ValueError,
        "leaf",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    logits, index, options, error, text = BAD[case]
    with pytest.raises(error, match=text):
        fastdpo.selective_log_softmax(logits, index, **options)
