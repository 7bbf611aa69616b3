"""linear_divergence: against its definition in fp64, on every engine, and what it promises at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import KINDS, eager, relative_error, two_heads

import fastdpo
from fastdpo.ops.divergence.problem import DIVERGENCE_STATS

FIELDS = fastdpo.DivergenceOutput._fields


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("mask", [False, True], ids=["labels", "mask"])
@pytest.mark.parametrize("kind,beta", KINDS)
def test_values_and_gradients(engine, kind, beta, mask, full):
    heads = two_heads(shape=(2, 5), full=full)
    stats = ("entropy",) if mask else DIVERGENCE_STATS
    found = heads(mask, kind=kind, jsd_beta=beta, stats=stats, backward="exact")
    exact = heads.to(torch.float64)
    expected = eager(exact, kind, beta)
    names = [name for name in FIELDS if getattr(found, name) is not None]
    assert set(names) == {"divergence", *stats}
    for name in names:
        value, true = getattr(found, name), getattr(expected, name)
        assert value.shape == heads.labels.shape and value.dtype == torch.float32
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=1e-5 * true.abs().max().item())
        assert (value[heads.labels == -100] == 0).all()
    differentiable = [name for name in names if name != "ref_logps"]
    for chosen in ([name] for name in differentiable), [differentiable]:
        for one in chosen:
            upstream = [torch.randn(heads.labels.shape, dtype=torch.float64) for _ in one]

            def loss(output, one=one, upstream=upstream):
                return sum(
                    (getattr(output, name) * u.to(output.divergence.dtype)).sum() for name, u in zip(one, upstream)
                )

            given = torch.autograd.grad(loss(found), heads.leaves, retain_graph=True)
            true = torch.autograd.grad(loss(expected), exact.leaves, retain_graph=True)
            for g, t in zip(given, true):
                assert relative_error(g, t) < (1e-5 if "entropy" in one else 5e-6), one


@pytest.mark.parametrize("kind,beta", KINDS)
def test_gradcheck(monkeypatch, kind, beta):
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    heads = two_heads(shape=(3,), V=140, H=3, H_ref=2, full=True, dtype=torch.float64)

    def function(*leaves):
        found = heads(kind=kind, jsd_beta=beta, stats=DIVERGENCE_STATS, backward="exact")
        return found.divergence, found.entropy, found.logps

    assert torch.autograd.gradcheck(function, heads.leaves, fast_mode=True)


def test_beta_of_jsd_at_its_ends_and_between():
    heads = two_heads(alike=0.9, H_ref=24)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert torch.equal(heads(kind="jsd", jsd_beta=beta).divergence, heads(kind=kind).divergence)
    near = heads(kind="jsd", jsd_beta=1e-3).divergence / 1e-3  # JSD / beta tends to KL(teacher || student)
    torch.testing.assert_close(near, heads(kind="forward_kl").divergence, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("kind,beta", KINDS)
def test_the_same_heads_have_no_divergence_and_no_gradient(engine, kind, beta):
    heads = two_heads(H_ref=24)
    heads.ref_hidden, heads.ref_weight = heads.hidden.detach(), heads.weight.detach()
    for mask in (False, True):
        found = heads(mask, kind=kind, jsd_beta=beta).divergence
        assert found.abs().max() < 1e-6
        for g in torch.autograd.grad(found.sum(), heads.leaves):
            assert g.abs().max() < 1e-4


def test_sure_tokens_keep_their_digits(engine):
    """Student and teacher both give their label 1 - 1e-7 or so: p - r is a difference of what is left."""
    V, H = 400, 8
    hidden = torch.zeros(4, H)
    hidden[:, 0] = 1.0
    labels = torch.tensor([3, 130, 399, 77])
    heads = two_heads(shape=(4,), V=V, H=H, H_ref=H)
    heads.hidden, heads.ref_hidden = hidden.clone().requires_grad_(), hidden
    heads.weight = (torch.randn(V, H) * 0.1).requires_grad_()
    heads.ref_weight, heads.labels = torch.randn(V, H) * 0.1, labels
    heads.bias, heads.ref_bias = torch.zeros(V).requires_grad_(), torch.zeros(V)
    with torch.no_grad():
        heads.bias[labels], heads.ref_bias[labels] = 22.0, 23.0
    heads.labels = torch.full((4,), 3)  # one label, so that one id is sure
    with torch.no_grad():
        heads.bias[labels[1:]], heads.ref_bias[labels[1:]] = 0.0, 0.0
    exact = heads.to(torch.float64)
    given = torch.autograd.grad(heads(kind="forward_kl", backward="exact").divergence.sum(), heads.leaves)
    true = torch.autograd.grad(eager(exact, "forward_kl").divergence.sum(), exact.leaves)
    for g, t in zip(given, true):
        assert relative_error(g, t) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(engine, dtype):
    if engine == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter's bf16 products are wrong")
    heads = two_heads(alike=0.5, dtype=dtype)
    found, exact = heads(backward="exact").divergence, heads.to(torch.float64)
    true = eager(exact, "forward_kl").divergence
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)
    given = torch.autograd.grad(found.sum(), heads.leaves)
    for g, t in zip(given, torch.autograd.grad(true.sum(), exact.leaves)):
        assert g.dtype == dtype and relative_error(g, t) < 5e-3


def test_layouts(engine):
    """Slices, steps, expanded and transposed tensors, and upstream gradients of stride 0."""
    heads = two_heads(shape=(2, 6), full=True)
    expected = heads(backward="exact", stats=("logps",))
    plain = torch.autograd.grad(expected.divergence.sum(), heads.leaves)

    def odd(x):
        wide = x.detach().new_zeros(*x.shape[:-1], x.shape[-1] * 2)
        wide[..., ::2] = x.detach()
        return wide[..., ::2].requires_grad_(x.requires_grad)

    other = two_heads(shape=(2, 6), full=True)
    for name in ("hidden", "weight", "ref_hidden", "ref_weight", "bias", "ref_bias"):
        setattr(other, name, odd(getattr(heads, name)))
    padded = torch.cat((heads.ref_hidden, torch.full((2, 1, 16), torch.nan)), 1)
    other.ref_hidden, other.options = padded[:, :-1], heads.options
    other.lora = (odd(heads.lora[0]), odd(heads.lora[1]), heads.lora[2])
    other.labels = heads.labels.T.contiguous().T
    found = other(backward="exact", stats=("logps",))
    torch.testing.assert_close(found.divergence, expected.divergence, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logps, expected.logps, rtol=1e-6, atol=1e-6)
    given = torch.autograd.grad(found.divergence, other.leaves, torch.ones(()).expand(2, 6))
    for g, t in zip(given, plain):
        torch.testing.assert_close(g, t, rtol=1e-5, atol=1e-6)


def test_masked_rows_are_never_read(engine):
    heads = two_heads()
    before = heads().divergence
    ignored = heads.labels == -100
    with torch.no_grad():
        heads.hidden[ignored], heads.ref_hidden[ignored] = torch.nan, torch.inf
    for mask in (False, True):
        found = heads(mask).divergence
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6)
        dhidden, dweight = torch.autograd.grad(found.sum(), heads.leaves)
        assert (dhidden[ignored] == 0).all() and dweight.isfinite().all()


def test_nan_stays_in_its_row(engine):
    heads = two_heads()
    row = (heads.labels != -100).nonzero()[1].tolist()
    for name in ("hidden", "ref_hidden"):
        poisoned = heads.to(torch.float32)
        with torch.no_grad():
            getattr(poisoned, name)[tuple(row)] = torch.nan
        found = poisoned(kind="reverse_kl").divergence
        assert found[tuple(row)].isnan() and found.isnan().sum() == 1
        (dhidden,) = torch.autograd.grad(found.sum(), poisoned.hidden)
        assert dhidden[tuple(row)].isnan().all() and dhidden.isnan().any(-1).sum() == 1


def test_bad_labels(engine):
    heads = two_heads()
    heads.labels[0, 0] = 300
    found = heads(stats=("logps",))
    assert found.divergence[0, 0].isnan() and found.logps[0, 0].isnan() and found.divergence.isnan().sum() == 1
    dhidden, dweight = torch.autograd.grad(found.divergence.sum(), heads.leaves)
    assert dhidden[0, 0].isnan().all() and dhidden.isnan().any(-1).sum() == 1 and dweight.isfinite().all()
    with pytest.raises(ValueError, match=r"labels\[0, 0\] = 300"):
        heads(check_labels=True)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_nothing_to_score(engine, shape):
    heads = two_heads(shape=shape)
    heads.labels.fill_(-100)
    for mask in (False, True):
        found = heads(mask, stats=("entropy",))
        assert found.divergence.shape == shape and (found.divergence == 0).all()
        for g in torch.autograd.grad(found.divergence.sum() + found.entropy.sum(), heads.leaves):
            assert (g == 0).all()


def test_ids_that_a_head_excludes(engine):
    """A bias of -inf is how padding is masked: in both heads, in the teacher's alone, in the student's alone."""
    heads = two_heads(shape=(4,), V=300)
    heads.labels = torch.tensor([0, 1, 2, 3])
    heads.bias, heads.ref_bias = torch.zeros(300), torch.zeros(300)
    heads.bias[256:], heads.ref_bias[256:] = -torch.inf, -torch.inf  # a whole block, and the end of another
    heads.bias[130:140], heads.ref_bias[130:140] = -torch.inf, -torch.inf
    exact = heads.to(torch.float64)
    inside = torch.cat((torch.arange(130), torch.arange(140, 256)))
    for name in ("weight", "ref_weight", "bias", "ref_bias"):
        setattr(exact, name, getattr(exact, name).detach()[inside].requires_grad_(name == "weight"))
    for kind, beta in KINDS:
        found = heads(kind=kind, jsd_beta=beta, backward="exact").divergence
        expected = eager(exact, kind, beta).divergence
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        given = torch.autograd.grad(found.sum(), heads.leaves)
        true = torch.autograd.grad(expected.sum(), exact.leaves)
        assert relative_error(given[0], true[0]) < 5e-6 and relative_error(given[1][inside], true[1]) < 5e-6
    heads.ref_bias = torch.zeros(300)
    assert (heads(kind="forward_kl").divergence == math.inf).all()
    assert heads(kind="reverse_kl").divergence.isfinite().all()
    assert heads(kind="jsd").divergence.isfinite().all()


def test_what_takes_no_gradient(engine):
    heads = two_heads(H_ref=24)
    heads.ref_hidden.requires_grad_(), heads.ref_weight.requires_grad_()
    found = heads(stats=("ref_logps",))
    assert not found.ref_logps.requires_grad
    found.divergence.sum().backward()
    assert heads.ref_hidden.grad is None and heads.ref_weight.grad is None
    heads.weight.requires_grad_(False)
    (dhidden,) = torch.autograd.grad(heads().divergence.sum(), [heads.hidden])
    torch.testing.assert_close(dhidden, heads.hidden.grad, rtol=0.2, atol=1e-2)
    with torch.no_grad():
        assert not heads().divergence.requires_grad


def test_repeats_and_second_derivatives(engine):
    heads = two_heads(V=2000)
    found = heads(seed=3, tau=0.1).divergence
    first = torch.autograd.grad(found.sum(), heads.leaves, retain_graph=True)
    second = torch.autograd.grad(found.sum(), heads.leaves, retain_graph=True)
    assert engine == "triton" or all(torch.equal(a, b) for a, b in zip(first, second))
    again = torch.autograd.grad(heads(seed=3, tau=0.1).divergence.sum(), heads.leaves)
    torch.testing.assert_close(again, first)
    (dhidden,) = torch.autograd.grad(found.sum(), [heads.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        dhidden.sum().backward()


def test_changes_between_forward_and_backward_raise():
    heads = two_heads()
    for name in ("ref_weight", "ref_hidden"):
        found = heads().divergence
        with torch.no_grad():
            getattr(heads, name).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            found.sum().backward()
    found = heads(kind="reverse_kl", stats=("logps",))
    found.divergence.detach().zero_(), found.logps.detach().zero_()  # copies of what is saved
    expected = heads(kind="reverse_kl", backward="exact").divergence
    given, true = (torch.autograd.grad(x.sum(), [heads.hidden])[0] for x in (found.divergence, expected))
    torch.testing.assert_close(given, true, rtol=0.3, atol=0.05)


def test_heads_of_two_sizes():
    """152064 rows and 151936, in small: the ids beyond the smaller belong to neither distribution."""
    heads = two_heads(V=300)
    heads.ref_weight = torch.cat((heads.ref_weight, torch.full((20, 16), torch.nan)))
    with pytest.raises(ValueError, match=r"V = 300 but ref_weight has V = 320.*vocab_size='common'"):
        heads()
    found = heads(vocab_size="common", backward="exact").divergence
    torch.testing.assert_close(found.double(), eager(_cut(heads, 300), "forward_kl").divergence, rtol=1e-5, atol=1e-5)
    cut = heads(vocab_size=280, backward="exact", check_labels=False)
    kept = heads.labels < 280
    expected = eager(_cut(heads, 280), "forward_kl").divergence
    torch.testing.assert_close(cut.divergence.double()[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert cut.divergence[~kept].isnan().all()
    _, dweight = torch.autograd.grad(cut.divergence[kept].sum(), heads.leaves)
    assert dweight.shape == (300, 24) and (dweight[280:] == 0).all() and (dweight[:280] != 0).any()
    for wrong in (0, 301, "most", 2.5):
        with pytest.raises((ValueError, TypeError), match="vocab_size"):
            heads(vocab_size=wrong)


def _cut(heads, count):
    exact = heads.to(torch.float64)
    exact.weight, exact.ref_weight = exact.weight[:count], exact.ref_weight[:count]
    exact.labels = torch.where(exact.labels >= count, 0, exact.labels)
    return exact


REFUSALS = [
    ({"kind": "kl"}, ValueError, "kind must be one of"),
    ({"jsd_beta": 1.5, "kind": "jsd"}, ValueError, r"jsd_beta must lie in \[0, 1\]"),
    ({"jsd_beta": 0.1}, ValueError, "jsd_beta belongs to kind='jsd'"),
    ({"stats": ("top1",)}, ValueError, "stats must be"),
    ({"stats": ("logps",), "mask": True}, ValueError, "labels_or_mask is a mask"),
    ({"ref_softcap": 0.0}, ValueError, "softcap"),
    ({"backward": "exact", "tau": 0.1}, ValueError, "tau belongs to"),
]


@pytest.mark.parametrize("options,error,match", REFUSALS)
def test_refused_options(options, error, match):
    with pytest.raises(error, match=match):
        two_heads()(**options)


def test_refused_tensors():
    def refused(match, error=ValueError, **changes):
        heads = two_heads()
        for name, x in changes.items():
            setattr(heads, name, x)
        with pytest.raises(error, match=match):
            heads()

    refused("ref_hidden has H = 16 but ref_weight has H = 9", ref_weight=torch.zeros(300, 9))
    refused("labels must be shaped like ref_hidden", ref_hidden=torch.zeros(3, 8, 16))
    refused("ref_bias must have shape", ref_bias=torch.zeros(3))
    refused("fp64 is for checking", TypeError, ref_hidden=torch.zeros(3, 7, 16).double())
    refused("both be fp64", TypeError, **{name: x for name, x in _doubles().items()})
    refused("labels must be int64", TypeError, labels=torch.zeros(3, 7))
    refused("ref_weight must be", ref_weight=torch.zeros(300))
    refused("ref_hidden must be a plain strided", TypeError, ref_hidden=torch.zeros(3, 7, 16).to_sparse())


def _doubles():
    return {"ref_hidden": torch.zeros(3, 7, 16).double(), "ref_weight": torch.zeros(300, 16).double()}


def test_autocast_multiplies_in_its_type():
    heads = two_heads(alike=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads(backward="exact").divergence
    rounded = heads.to(torch.bfloat16)
    torch.testing.assert_close(found, rounded(backward="exact").divergence, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
