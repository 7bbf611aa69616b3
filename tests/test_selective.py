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


# Entropy


def entropy_definition(logits, index, temperature):
    logp = (logits.double() / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    several = index.ndim == logits.ndim
    return (entropy[..., None] if several else entropy) * (index != -100)


def gradient_definition(logits, index, dlogps, dentropy, temperature):
    """By formula: autograd's of a masked column is NaN."""
    if index.ndim < logits.ndim:
        index, dlogps, dentropy = index[..., None], dlogps[..., None], dentropy[..., None]
    kept = index != -100
    dlogps, of_row = dlogps.double() * kept, (dentropy.double() * kept).sum(-1, keepdim=True)
    logp = (logits.double() / temperature).log_softmax(-1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1, keepdim=True)
    dz = torch.zeros_like(logp).scatter_add(-1, index.clamp(min=0), dlogps)
    dz = dz - dlogps.sum(-1, keepdim=True) * p - torch.where(p > 0, of_row * p * (logp + entropy), 0.0)
    return dz / temperature


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("shape", [(3, 5, 1000), (7, 333), (2, 2, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entropy_matches_definition(engine, dtype, shape, columns, inplace):
    leaf = (torch.randn(shape) * 4).to(dtype)
    if shape[-1] > 500:
        leaf[..., 20:200] = -torch.inf  # a masked part of the vocabulary
    leaf.requires_grad_()
    index = torch.randint(0, shape[-1], shape[:-1] + ((columns,) if columns else ()))
    index.view(-1)[1] = -100
    dlogps, dentropy = torch.randn(2, *index.shape)
    logps, entropy = fastdpo.selective_log_softmax(
        leaf * 1, index, temperature=0.7, inplace_backward=inplace, return_entropy=True
    )
    assert torch.equal(logps, fastdpo.selective_log_softmax(leaf, index, temperature=0.7))
    assert entropy.dtype == logps.dtype and entropy.shape == index.shape
    wanted = entropy_definition(leaf.detach(), index, 0.7)
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=4e-6)
    finite = index == -100 if shape[-1] <= 500 else logps.isfinite() | (index == -100)
    assert (entropy[index == -100] == 0).all() and entropy.isfinite().all() and finite.numel()
    (dlogits,) = torch.autograd.grad((logps, entropy), leaf, (dlogps.to(logps.dtype), dentropy.to(logps.dtype)))
    wanted = gradient_definition(leaf.detach(), index, dlogps, dentropy, 0.7)
    if shape[-1] > 1:
        assert relative_error(dlogits, wanted) < 2 * TOLERANCE[dtype]
    else:
        assert dlogits.abs().max() < 1e-5


@pytest.mark.parametrize("of_logps,of_entropy", [(1.0, 0.0), (0.0, 1.0)])
def test_either_gradient_alone(engine, of_logps, of_entropy):
    logits, index = (torch.randn(6, 300) * 3).requires_grad_(), torch.randint(300, (6,))
    logps, entropy = fastdpo.selective_log_softmax(logits, index, return_entropy=True)
    (logps if of_logps else entropy).sum().backward()
    ones = torch.ones(6)
    wanted = gradient_definition(logits.detach(), index, of_logps * ones, of_entropy * ones, 1.0)
    assert relative_error(logits.grad, wanted) < 3e-6


@pytest.mark.parametrize("V", [1000, 1_000_000])
def test_entropy_from_flat_to_certain(engine, V):
    """Entropy log V, 0, and between; large logits, whose magnitude must not cost digits."""
    logits = torch.zeros(6, V)
    logits[1, 7] = 100.0
    logits[2, 7] = 20.0
    logits[3] = torch.randn(V)
    logits[4] = torch.randn(V) * 10
    logits[5] = 1e4 + torch.randn(V).mul(64).round() / 64  # what fp32 holds exactly there
    for column in (7, 8):
        index = torch.full((6,), column)
        _, entropy = fastdpo.selective_log_softmax(logits, index, return_entropy=True)
        torch.testing.assert_close(entropy.double(), entropy_definition(logits, index, 1.0), rtol=1e-5, atol=1e-5)


def test_entropy_of_rows_with_nan_infinity_or_no_label(engine):
    logits = torch.randn(7, 400)
    logits[0, 3] = torch.nan
    logits[1] = torch.nan
    logits[2, 390] = torch.inf
    logits[3] = -torch.inf
    logits[3, 5] = 2.0
    logits.requires_grad_()
    index = torch.tensor([3, -100, 2, 5, 400, -1, 7])
    logps, entropy = fastdpo.selective_log_softmax(logits, index, return_entropy=True)
    (logps + entropy).sum().backward()
    assert entropy[[0, 2, 4, 5]].isnan().all() and logits.grad[[0, 2, 4, 5]].isnan().any(1).all()
    assert entropy[1] == 0 and (logits.grad[1] == 0).all()
    assert logps[3] == 0 and entropy[3] == 0 and (logits.grad[3] == 0).all()
    assert torch.isfinite(entropy[6]) and torch.isfinite(logits.grad[6]).all()


def test_entropy_of_strided_and_empty_logits(engine):
    base = torch.randn(6, 2 * 700)
    logits, index = base[:, ::2], torch.randint(0, 700, (6,))
    _, entropy = fastdpo.selective_log_softmax(logits, index, return_entropy=True)
    torch.testing.assert_close(entropy.double(), entropy_definition(logits, index, 1.0), rtol=1e-5, atol=4e-6)
    empty = torch.randn(0, 7, requires_grad=True)
    pair = fastdpo.selective_log_softmax(empty, torch.zeros(0, dtype=torch.int64), return_entropy=True)
    sum(pair).sum().backward()
    assert empty.grad.shape == (0, 7)


def test_large_fp32_logits(engine):
    """Beyond 2.3e38, where a product with log2(e) overflows."""
    logits = torch.full((1, 300), -3.0e38)
    logits[0, [3, 250]] = 3.3e38
    logps, entropy = fastdpo.selective_log_softmax(logits, torch.tensor([3]), return_entropy=True)
    half = torch.tensor([0.5])
    torch.testing.assert_close(logps, half.log())
    torch.testing.assert_close(entropy, -half.log())


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
