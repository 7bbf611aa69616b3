"""Several labels a row, and lse with a gradient: one read of the logits, each label with its own upstream gradient."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head

import fastdpo
from fastdpo.ops import several

TRANSFORMS = {"plain": {}, "all": {"logit_scale": 1.2, "softcap": 6.0, "temperature": 0.8}}
EVERY_PAIR = {"tau": 0.0, "seed": 5}
HOW = {"exact": {"backward": "exact"}, "every pair": EVERY_PAIR}


def several_labels(N=23, V=700, K=7) -> torch.Tensor:
    labels = torch.randint(0, V, (N, K))
    labels[torch.rand(N, K) < 0.3] = -100
    labels[:, 1] = labels[:, 0]  # repeated
    labels[4] = -100
    labels[5, 1:] = -100
    return labels


def defined(head, labels, **transform):
    """(logps [N, K], lse [N]) of fp64 leaves, by torch's own autograd."""
    z = head.logits(**transform)
    logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0)).masked_fill(labels == -100, 0.0)
    return logps, z.logsumexp(-1).masked_fill((labels == -100).all(-1), 0.0)


def upstream(labels):
    return torch.randn(labels.shape, dtype=torch.float64), torch.randn(labels.shape[:-1], dtype=torch.float64)


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(engine, dtype, transform, how):
    if engine == "triton" and (dtype == torch.bfloat16) != (how == "exact") and transform == "plain":
        pytest.skip("20 seconds in the interpreter, of nothing that the others leave out")
    head, labels = small_head(N=23, V=700, bias=True, lora=True), several_labels()
    head.hidden[4] = torch.nan  # not read
    leaves, exact = head.leaves(dtype), head.rounded(dtype)
    exact.hidden.data[4] = 0.0
    stats = fastdpo.linear_token_stats(
        leaves.hidden, leaves.weight, labels, leaves.bias, lora=leaves.lora, **TRANSFORMS[transform], **HOW[how]
    )
    logps, lse = defined(exact, labels, **TRANSFORMS[transform])
    torch.testing.assert_close(stats.logps.double(), logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(stats.lse.double(), lse, rtol=1e-5, atol=2e-5)
    g, g_lse = upstream(labels)
    ((stats.logps * g).sum() + (stats.lse * g_lse).sum()).backward()
    ((logps * g).sum() + (lse * g_lse).sum()).backward()
    for (name, mine), other in zip(leaves.tensors().items(), exact.tensors().values()):
        rounding = relative_error(other.grad.to(dtype), other.grad)
        bound = 5e-6 if dtype == torch.float32 else 1.5 * rounding
        assert relative_error(mine.grad, other.grad) < bound, name


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform):
    head, labels = small_head(N=3, V=20, H=4, bias=True, lora=True).leaves(torch.float64), several_labels(6, 20, 4)[:3]

    def call(hidden, weight, bias, a, b):
        stats = fastdpo.linear_token_stats(
            hidden, weight, labels, bias, lora=(a, b, 0.7), backward="exact", **TRANSFORMS[transform]
        )
        return stats.logps, stats.entropy, stats.lse

    assert torch.autograd.gradcheck(call, tuple(head.tensors().values()))


def test_sure_tokens_keep_their_digits(engine):
    """1 - p down to 1e-7, with the sure id anywhere among the labels."""
    head, labels = small_head(N=8, V=300, H=64), torch.randint(0, 300, (8, 5))
    for row in range(8):
        w = head.weight[labels[row, row % 5]]
        head.hidden[row] = w * (3 * row + 8) / (w @ w)
    leaves, exact = head.leaves(torch.float32), head.rounded(torch.float32)
    ours = fastdpo.linear_logps(leaves.hidden, leaves.weight, labels, backward="exact")
    logps, _ = defined(exact, labels)
    torch.testing.assert_close(ours.double(), logps, rtol=1e-5, atol=1e-30)
    assert -1e-5 < logps.amax() < 0
    sure = torch.arange(8), torch.arange(8) % 5
    ours[sure].sum().backward()
    logps[sure].sum().backward()
    for row in range(8):
        assert relative_error(leaves.hidden.grad[row], exact.hidden.grad[row]) < 1e-5


def test_one_label_in_a_dimension_of_its_own(engine):
    head = small_head(N=12, V=300, masked=True)
    for stats in (("entropy",), fastdpo.logps.STATS):
        found = []
        for labels in (head.labels, head.labels[:, None]):
            leaves = head.leaves(torch.float32)
            one = fastdpo.linear_token_stats(leaves.hidden, leaves.weight, labels, stats=stats, tau=0.1, seed=3)
            one.logps.sum().backward()
            found.append((one, leaves))
        (flat, a), (column, b) = found
        assert column.logps.shape == (12, 1) and column.entropy.shape == (12,)
        for mine, other in zip(column, flat):
            assert (mine is None and other is None) or torch.equal(mine.view(-1), other)
        assert torch.equal(a.hidden.grad, b.hidden.grad) and torch.equal(a.weight.grad, b.weight.grad)


def test_what_is_of_a_label_and_what_of_a_row():
    head, labels = small_head(N=23, V=700), several_labels()
    leaves = head.leaves(torch.float64)
    z = head.logits()
    labels[7, 3], labels[8, 0] = z[7].argmax(), z[8].argmax()
    labels[8, 1] = labels[8, 0]
    stats = fastdpo.linear_token_stats(leaves.hidden.view(1, 23, -1), leaves.weight, labels.view(1, 23, 7))
    rows = (labels != -100).any(1)
    p = z.softmax(-1)
    assert torch.equal(stats.is_top1[0], labels == z.argmax(-1, keepdim=True)) and stats.is_top1[0, 8, :2].all()
    torch.testing.assert_close(stats.entropy[0], (-(p * p.log()).sum(-1)).masked_fill(~rows, 0.0))
    torch.testing.assert_close(stats.mean_logit[0], z.mean(-1).masked_fill(~rows, 0.0))
    torch.testing.assert_close(stats.log_sum_sq_probs[0], (p * p).sum(-1).log().masked_fill(~rows, 0.0))


def test_labels_out_of_range(engine):
    head, labels = small_head(N=9, V=300, bias=True), torch.randint(0, 300, (9, 4))
    bad = labels.clone()
    bad[2, 1], bad[5] = 300, -7
    found = []
    for ids in (bad, bad.masked_fill((bad < 0) | (bad >= 300), -100)):
        leaves = head.leaves(torch.float32)
        logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, ids, leaves.bias, backward="exact")
        logps.backward(torch.ones_like(logps))
        found.append((logps, leaves))
    (logps, leaves), (valid, others) = found
    wrong = (bad < 0) | (bad >= 300)
    assert torch.equal(logps.isnan(), wrong) and torch.equal(logps[~wrong], valid[~wrong])
    rows = wrong.any(1)
    assert torch.equal(leaves.hidden.grad.isnan(), rows[:, None].expand(9, 48))
    assert torch.equal(leaves.hidden.grad[~rows], others.hidden.grad[~rows])
    assert torch.equal(leaves.weight.grad, others.weight.grad) and torch.equal(leaves.bias.grad, others.bias.grad)
    with pytest.raises(ValueError, match=r"labels\[2, 1\] = 300"):
        fastdpo.linear_logps(leaves.hidden, leaves.weight, bad, check_labels=True)


@pytest.mark.parametrize("shape", [(0, 5), (6, 0), (6, 4, 2), (5, 3)], ids=str)
def test_shapes(engine, shape):
    head, labels = small_head(N=6, V=300), torch.zeros(shape, dtype=torch.int64)
    hidden = head.hidden[: shape[0] if shape[0] == 0 else 6].float().requires_grad_()
    if shape[0] == 0:
        fastdpo.linear_logps(hidden, head.weight.float(), labels).sum().backward()
        assert hidden.grad.shape == (0, 48)
    else:
        with pytest.raises(ValueError, match="labels must be shaped"):
            fastdpo.linear_logps(hidden, head.weight.float(), labels)


def test_everything_ignored(engine):
    leaves = small_head(N=6, V=300).leaves(torch.float32)
    leaves.hidden.data.fill_(torch.nan)
    stats = fastdpo.linear_token_stats(leaves.hidden, leaves.weight, torch.full((6, 3), -100))
    (stats.logps.sum() + stats.lse.sum()).backward()
    for x in (stats.logps, stats.lse, leaves.hidden.grad, leaves.weight.grad):
        assert not x.any()


def test_any_layout(engine):
    head, labels = small_head(N=24, V=300), several_labels(24, 300, 6)
    results = []
    for odd in (False, True):
        leaves = head.leaves(torch.bfloat16)
        hidden, ids, coef = leaves.hidden.view(4, 6, 48), labels.view(4, 6, 6), torch.full((4, 6, 6), 0.5)
        if odd:
            hidden = torch.cat((hidden, hidden[:, :1]), 1)[:, :-1]
            ids, coef = ids.permute(2, 0, 1).contiguous().permute(1, 2, 0).int(), coef[:1, :1, :1].expand(4, 6, 6)
        logps = fastdpo.linear_logps(hidden, leaves.weight, ids, backward="exact")
        logps.backward(coef)
        results.append((logps.detach(), leaves.hidden.grad, leaves.weight.grad))
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(1, 0, 0, 0, 0), (0, 1, 1, 0, 0), (1, 1, 1, 1, 1), (0, 0, 0, 1, 0)], ids=str)
def test_ranges_of_rows(engine, needs, monkeypatch):
    """dhidden in a half type is summed in fp32 and rounded once, a range of rows after the other."""
    if engine == "triton" and not all(needs):
        pytest.skip("a minute in the interpreter")
    head, labels = small_head(N=24, V=300, bias=True, lora=True), several_labels(24, 300, 4)
    results = []
    for limit in (1 << 20, 4 * 48 * 9):
        monkeypatch.setattr(several, "SUMS_BYTES", limit)
        leaves = head.leaves(torch.bfloat16)
        for x, need in zip(leaves.tensors().values(), needs):
            x.requires_grad_(bool(need))
        hidden = leaves.hidden.view(2, 12, 48)
        hidden = torch.cat((hidden, hidden), 1)[:, :12]  # rows without a flat view
        logps = fastdpo.linear_logps(
            hidden, leaves.weight, labels.view(2, 12, 4), leaves.bias, lora=leaves.lora, tau=0.02, seed=2
        )
        (logps * torch.arange(24).view(2, 12, 1)).sum().backward()
        results.append([x.grad for x in leaves.tensors().values()])
    for mine, other, need in zip(*results, needs):
        assert (mine is None) == (not need)
        assert mine is None or relative_error(mine, other) < 4e-3


@pytest.mark.parametrize("of", ["several", "lse"])
def test_unbiased(of, monkeypatch):
    """The mean over draws is the exact gradient: |t| < 4 along random directions, of the block that no label is in."""
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    head = small_head(N=6, V=1280, H=12, sharpness=0.5)
    labels = torch.randint(0, 1280, (6, 3)) if of == "several" else head.labels

    def gradients(**options):
        leaves = head.leaves(torch.float32)
        stats = fastdpo.linear_token_stats(leaves.hidden, leaves.weight, labels, stats=("lse",), **options)
        (stats.lse.sum() if of == "lse" else (stats.logps * torch.tensor([1.0, -0.7, 0.4])).sum()).backward()
        return torch.cat((leaves.hidden.grad.flatten(), leaves.weight.grad.flatten())).double()

    exact = gradients(backward="exact")
    directions = torch.randn(len(exact), 12, dtype=torch.float64)
    draws = torch.stack([gradients(tau=0.3, seed=seed) @ directions for seed in range(400)])
    error = draws.mean(0) - exact @ directions
    t = error / (draws.std(0) / 400**0.5)
    assert draws.std(0).amin() > 1e-4 and t.abs().amax() < 4.0, t


def test_a_second_derivative_is_refused():
    leaves = small_head(N=4, V=50).leaves(torch.float64)
    labels = torch.randint(0, 50, (4, 3))
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, labels)
    (grad,) = torch.autograd.grad(logps.sum(), leaves.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_a_weight_that_accumulates(engine):
    head, labels = small_head(N=9, V=300), several_labels(9, 300, 4)
    leaves, plain = head.leaves(torch.float32), head.leaves(torch.float32)
    leaves.weight.grad = torch.ones_like(leaves.weight)
    place = leaves.weight.grad
    for x, options in ((leaves, {"accumulate_into": "grad"}), (plain, {})):
        fastdpo.linear_logps(x.hidden, x.weight, labels, backward="exact", **options).sum().backward()
    assert leaves.weight.grad.data_ptr() == place.data_ptr()
    torch.testing.assert_close(leaves.weight.grad, plain.weight.grad + 1.0, rtol=1e-5, atol=1e-5)


def test_256_labels():
    head, labels = small_head(N=5, V=600), torch.stack([torch.randperm(600)[:256] for _ in range(5)])
    leaves, exact = head.leaves(torch.float32), head.rounded(torch.float32)
    ours = fastdpo.linear_logps(leaves.hidden, leaves.weight, labels, backward="exact")
    logps, _ = defined(exact, labels)
    torch.testing.assert_close(ours.double(), logps, rtol=1e-5, atol=1e-5)
    ours.exp().sum().backward()
    logps.exp().sum().backward()
    assert relative_error(leaves.weight.grad, exact.weight.grad) < 5e-6


def test_compiles_without_a_break(engine):
    head, labels = small_head(N=12, V=300), several_labels(12, 300, 5)

    def step(hidden, weight):
        stats = fastdpo.linear_token_stats(hidden, weight, labels, stats=("lse",), backward="exact")
        return stats.logps.sum() + (stats.lse**2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (compiled, step):
        leaves = head.leaves(torch.float32)
        function(leaves.hidden, leaves.weight).backward()
        grads.append((leaves.hidden.grad, leaves.weight.grad))
    for mine, other in zip(*grads):
        assert relative_error(mine, other) < 1e-5


def test_linear_dpo_loss_takes_one_label_a_row():
    with pytest.raises(ValueError, match="labels"):
        fastdpo.linear_dpo_loss(torch.randn(4, 3, 8), torch.randn(50, 8), torch.zeros(4, 3, 2, dtype=torch.int64))
