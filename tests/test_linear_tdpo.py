"""linear_dpo_loss of losses that read the reference's whole distribution: against eager logits and the source's
formula, from one sweep over both heads."""

import pytest
import torch
from test_linear_dpo import IGNORE, B, Batch, H, T, V, assert_same, eager_logits, eager_logps, grads

import fastdpo.linear_dpo
from fastdpo.linear_dpo import LinearDPOLoss, linear_dpo_loss
from fastdpo.preference import preference_loss

CASES = {
    "tdpo1": {"loss_type": "tdpo1"},
    "tdpo2": {"loss_type": "tdpo2", "tdpo_alpha": 0.8},
    "list": {"loss_type": ["sigmoid", "tdpo2", "sft", "tdpo1"], "loss_weights": [0.3, 1.0, 0.2, -0.4]},
    "LD": {"loss_type": "tdpo1", "ld_alpha": 0.3},
    "average": {"loss_type": "tdpo2", "average_log_prob": True},
    "WPO": {"loss_type": ["tdpo1", "hinge"], "use_weighting": True},
}


class TwoHeads(Batch):
    """A reference of another hidden size."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__(seed, dtype)
        generator = torch.Generator().manual_seed(seed + 1)
        self.ref_hidden = torch.randn(2 * B, T, H + 3, generator=generator, dtype=torch.float64).to(dtype)
        self.ref_weight = (0.4 * torch.randn(V, H + 3, generator=generator, dtype=torch.float64)).to(dtype)

    @property
    def reference(self):
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}


def per_token(batch, **transform):
    """(log-probs of policy and reference, KL(reference || policy)), zero outside completions, of full log_softmax."""
    heads = (batch.leaves, (batch.ref_hidden, batch.ref_weight, batch.ref_bias))
    p, r = (eager_logits(*head, **transform).log_softmax(-1) for head in heads)
    kl = (r.exp() * (r - p)).sum(-1).masked_fill(~batch.mask, 0.0)
    return *(eager_logps(batch.labels, *head, **transform) for head in heads), kl


def expected_loss(batch, case, **transform):
    """As trainers.py of the source sums it; ld_alpha and the mean weigh the tokens' KL as their log-probs."""
    case = dict(case)
    logps, ref_logps, kl = per_token(batch, **transform)
    counts = batch.mask.sum(1)
    shared = torch.minimum(counts[:B], counts[B:]).repeat(2)[:, None]
    within = (batch.mask.cumsum(1) <= shared).double()
    weights = within + case.pop("ld_alpha", 1.0) * (1 - within)
    if case.pop("average_log_prob", False):
        weights = weights / counts[:, None]
    s, r, k = ((weights * x).sum(1) for x in (logps, ref_logps, kl))
    row = 1.0
    if case.pop("use_weighting", False):
        agreement = logps - batch.mask * eager_logits(*batch.leaves).softmax(-1).pow(2).sum(-1).log()
        row = (agreement.sum(1) / counts).exp().detach()
        row = row[:B] * row[B:]
    out = preference_loss(
        s[:B], s[B:], r[:B], r[B:], chosen_kl=k[:B], rejected_kl=k[B:], beta=0.2,
        chosen_lengths=counts[:B], rejected_lengths=counts[B:], **case,
    )  # fmt: skip
    return (row * out.losses).mean(), out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_equals_eager_logits(case, layout):
    batch = TwoHeads(seed=1)
    expected, wanted = expected_loss(batch, case)
    hidden, labels, reference, cu_seqlens = batch.hidden, batch.labels, batch.reference, None
    if layout == "packed":
        hidden, labels, cu_seqlens, pick = batch.packed()
        reference["ref_hidden"] = pick(batch.ref_hidden)
    out = linear_dpo_loss(
        hidden, batch.weight, labels, bias=batch.bias, cu_seqlens=cu_seqlens, beta=0.2, backward="exact",
        **reference, **case,
    )  # fmt: skip
    assert_same([out.loss], [expected])
    assert_same(out[2:4], wanted[2:4])
    assert_same(grads(out.loss, batch.leaves), grads(expected, batch.leaves))


def test_tdpo2_equals_the_source():
    """Formula and detached place written out once more, on logits; the reward has the KL in it."""
    batch = TwoHeads(seed=2)
    logps, ref_logps, kl = per_token(batch)
    margin, kl = (logps - ref_logps).sum(1), kl.sum(1)
    losses = -torch.nn.functional.logsigmoid(0.1 * (margin[:B] - margin[B:] - 0.5 * (kl[B:] - kl[:B].detach())))
    out = linear_dpo_loss(
        batch.hidden,
        batch.weight,
        batch.labels,
        bias=batch.bias,
        loss_type="tdpo2",
        backward="exact",
        **batch.reference,
    )
    assert_same(out[:4], [losses.mean(), losses, 0.1 * (margin + kl)[:B], 0.1 * (margin + kl)[B:]])
    assert_same(grads(out.loss, batch.leaves), grads(losses.mean(), batch.leaves))


def test_one_sweep_scores_both(monkeypatch):
    """No head is read for log-probs alone, and the reference is not differentiated."""
    batch = TwoHeads(seed=3)
    batch.ref_hidden.requires_grad_()
    batch.ref_weight.requires_grad_()
    calls, divergence = [], fastdpo.linear_dpo.reference_divergence
    monkeypatch.setattr(fastdpo.linear_dpo, "token_stats", None)
    monkeypatch.setattr(
        fastdpo.linear_dpo, "reference_divergence", lambda *x, **y: calls.append(y) or divergence(*x, **y)
    )
    out = linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, loss_type=["tdpo1", "sigmoid"], **batch.reference
    )
    assert len(calls) == 1
    assert grads(out.loss, [batch.ref_hidden, batch.ref_weight]) == (None, None)
    assert out.chosen_logps.requires_grad and not out.chosen_rewards.requires_grad


def test_transforms_reach_both_heads():
    batch = TwoHeads(seed=4)
    transform = {"logit_scale": 0.7, "softcap": 3.0, "temperature": 1.4}
    expected, _ = expected_loss(batch, CASES["tdpo1"], **transform)
    out = linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, loss_type="tdpo1", beta=0.2, backward="exact",
        **batch.reference, **transform,
    )  # fmt: skip
    assert_same([out.loss], [expected])
    assert_same(grads(out.loss, batch.leaves), grads(expected, batch.leaves))


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_policy_that_is_its_reference(name):
    """The first step of training: no margin, no KL, and of the KL no gradient."""
    batch = Batch(seed=5)
    reference = {"ref_hidden": batch.hidden.detach()}
    arguments = (batch.hidden, batch.weight, batch.labels)
    out = linear_dpo_loss(*arguments, loss_type=name, backward="exact", **reference)
    expected = linear_dpo_loss(*arguments, backward="exact", **reference)
    assert_same(out, expected)
    assert_same(grads(out.loss, batch.leaves[:2]), grads(expected.loss, batch.leaves[:2]))


def test_adapter_on_the_head():
    """The reference is the head without it."""
    batch = Batch(seed=6)
    a, b = torch.randn(4, H, dtype=torch.float64, requires_grad=True), torch.randn(V, 4, dtype=torch.float64)
    b.requires_grad_()
    options = {"loss_type": "tdpo2", "ref_hidden": batch.ref_hidden, "backward": "exact"}
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, lora=(a, b, 0.3), **options)
    merged = batch.weight + 0.3 * b @ a
    expected = linear_dpo_loss(batch.hidden, merged, batch.labels, ref_weight=batch.weight, **options)
    assert_same(out, expected)
    assert_same(grads(out.loss, [batch.hidden, a, b]), grads(expected.loss, [batch.hidden, a, b]))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_empty_completions_and_rows_outside(layout):
    """Prompt and padding are never read, in either model; a pair without tokens has loss log 2 and no gradient."""
    batch = TwoHeads(seed=7)
    batch.labels[1] = batch.labels[B + 1] = batch.labels[2] = IGNORE
    with torch.no_grad():
        batch.hidden[~batch.mask] = torch.nan
        batch.ref_hidden[~batch.mask] = torch.nan
    hidden, labels, reference, cu_seqlens = batch.hidden, batch.labels, batch.reference, None
    if layout == "packed":
        hidden, labels, cu_seqlens, pick = batch.packed()
        reference["ref_hidden"] = pick(batch.ref_hidden)
    out = linear_dpo_loss(
        hidden, batch.weight, labels, cu_seqlens=cu_seqlens, bias=batch.bias, loss_type=["tdpo1", "tdpo2"], **reference
    )
    assert out.losses.isfinite().all() and out.losses[1].item() == pytest.approx(
        2 * torch.log(torch.tensor(2.0)).item()
    )
    assert out.chosen_logps[1:].eq(0).all() and out.chosen_rewards[1:].eq(0).all()
    dhidden, dweight, dbias = grads(out.loss, batch.leaves)
    assert dhidden.isfinite().all() and dweight.isfinite().all() and dbias.isfinite().all()
    assert (dhidden[~batch.mask] == 0).all() and dhidden[0].any() and dhidden[B + 2].any()


@pytest.mark.parametrize("pairs", [0, 2])
def test_no_tokens_at_all(pairs):
    weight = torch.randn(V, H, requires_grad=True)
    hidden = torch.zeros(2 * pairs, 0 if pairs else T, H, requires_grad=True)
    labels = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    out = linear_dpo_loss(hidden, weight, labels, ref_hidden=hidden.detach(), loss_type="tdpo2")
    assert out.losses.shape == (pairs,) and out.loss.isfinite()
    out.loss.backward()
    assert hidden.grad.shape == hidden.shape and (weight.grad is None or not weight.grad.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_engine(engine, dtype):
    """The default backward, of reduced types; within what routing adds to the exact gradient."""
    device = torch.get_default_device()
    batch = TwoHeads(seed=8, dtype=dtype)
    moved = {name: x.to(device) for name, x in batch.reference.items()}
    leaves = [x.detach().to(device).requires_grad_() for x in batch.leaves]
    out = linear_dpo_loss(
        leaves[0], leaves[1], batch.labels.to(device), bias=leaves[2], loss_type=["tdpo2", "tdpo1"], beta=0.2, seed=3,
        **moved,
    )  # fmt: skip
    expected, wanted = expected_loss(batch, {"loss_type": ["tdpo2", "tdpo1"]})
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.losses.double().cpu(), wanted.losses, rtol=2e-5, atol=2e-5)
    for grad, true in zip(grads(out.loss, leaves), grads(expected, batch.leaves)):
        error = (grad.double().cpu() - true.double()).norm() / true.double().norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-2)


def test_module():
    batch = TwoHeads(seed=9)
    options = {"loss_type": ["tdpo2", "sigmoid"], "tdpo_alpha": 0.2, "backward": "exact"}
    arguments = (batch.hidden, batch.weight, batch.labels)
    out = LinearDPOLoss(0.3, **options)(*arguments, bias=batch.bias, **batch.reference)
    assert_same(out, linear_dpo_loss(*arguments, bias=batch.bias, beta=0.3, **batch.reference, **options))


def test_compiled():
    batch = TwoHeads(seed=10, dtype=torch.float32)

    def step(hidden, weight, bias):
        return linear_dpo_loss(
            hidden, weight, batch.labels, bias=bias, loss_type="tdpo2", backward="exact", **batch.reference
        ).loss

    compiled, plain = (torch.compile(step, backend="aot_eager")(*batch.leaves), step(*batch.leaves))
    torch.testing.assert_close(compiled, plain)
    for grad, wanted in zip(grads(compiled, batch.leaves), grads(plain, batch.leaves)):
        torch.testing.assert_close(grad, wanted)
