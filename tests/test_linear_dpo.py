"""linear_dpo_loss: against TRL's own code and eager logits, in both layouts, and its contract."""

import math

import pytest
import torch

from fastdpo.linear_dpo import LinearDPOLoss, linear_dpo_loss
from fastdpo.preference import preference_loss

B, T, H, V = 3, 8, 16, 300
IGNORE = -100


class Batch:
    """A small head and [2B, T] sequences of different lengths, prompts masked; fp64 unless told."""

    def __init__(self, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = randn(2 * B, T, H).requires_grad_()
        self.ref_hidden = randn(2 * B, T, H)
        self.weight = (0.4 * randn(V, H)).requires_grad_()
        self.ref_weight = 0.4 * randn(V, H)
        self.bias = (0.4 * randn(V)).requires_grad_()
        self.ref_bias = 0.4 * randn(V)
        self.labels = torch.randint(0, V, (2 * B, T), generator=generator)
        # prompt, completion, padding; one completion is interrupted, as in a dialogue of several turns
        for row, (start, stop) in enumerate([(1, 8), (2, 4), (0, 6), (3, 5), (1, 7), (0, 8)]):
            self.labels[row, :start] = IGNORE
            self.labels[row, stop:] = IGNORE
        self.labels[5, 3:5] = IGNORE

    @property
    def mask(self):
        return self.labels != IGNORE

    @property
    def leaves(self):
        return [self.hidden, self.weight, self.bias]

    def packed(self):
        """The same tokens, rows cut at different places: (hidden, labels, cu_seqlens, pick)."""
        stops = [8, 5, 6, 6, 7, 8]
        rows = torch.cat([torch.arange(stop) + row * T for row, stop in enumerate(stops)])
        cu_seqlens = torch.tensor([0, *stops]).cumsum(0)

        def pick(x):
            return x.reshape(2 * B * T, *x.shape[2:])[rows]

        return pick(self.hidden), pick(self.labels), cu_seqlens, pick


def eager_logits(hidden, weight, bias, logit_scale=1.0, softcap=None, temperature=1.0):
    z = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    z = z * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z / temperature


def eager_logps(batch_labels, *head, **transform):
    logps = eager_logits(*head, **transform).log_softmax(-1)
    logps = logps.gather(-1, batch_labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(batch_labels == IGNORE, 0.0)


def grads(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_same(a, b, rtol=1e-10, atol=1e-12):
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, check_dtype=False)


TRL_CASES = [
    {},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True, "ld_alpha": 0.3},  # TRL fails with sft here
    {"loss_type": ["apo_zero", "ipo"], "use_weighting": True},
    {"loss_type": "robust", "label_smoothing": 0.1, "ld_alpha": 0.0},
    {"loss_type": "sigmoid_norm", "ld_alpha": 0.5, "f_divergence_type": "js_divergence"},
    {"loss_type": ["aot", "sft"], "ld_alpha": 1.0},
    {"loss_type": "discopop", "f_divergence_type": "js_divergence", "discopop_tau": 0.5},
]


@pytest.mark.parametrize("case", TRL_CASES, ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_equals_dpo_trainer(case, layout):
    """TRL's `_compute_loss` on eager log-probs: loss, gradients and what the trainer logs."""
    import trl_oracle

    batch = Batch(seed=1)
    logps = eager_logps(batch.labels, *batch.leaves)
    ref_logps = eager_logps(batch.labels, batch.ref_hidden, batch.ref_weight, batch.ref_bias)
    p = eager_logits(*batch.leaves).softmax(-1)
    log_sum_sq_probs = p.pow(2).sum(-1).log().detach() * batch.mask
    expected, logged = trl_oracle.dpo_loss(logps, ref_logps, batch.mask, log_sum_sq_probs, beta=0.2, **case)

    hidden, labels, ref_hidden, cu_seqlens = batch.hidden, batch.labels, batch.ref_hidden, None
    if layout == "packed":
        hidden, labels, cu_seqlens, pick = batch.packed()
        ref_hidden = pick(ref_hidden)
    out = linear_dpo_loss(
        hidden, batch.weight, labels, bias=batch.bias, ref_hidden=ref_hidden, ref_weight=batch.ref_weight,
        ref_bias=batch.ref_bias, cu_seqlens=cu_seqlens, beta=0.2, backward="exact", **case,
    )  # fmt: skip
    assert_same([out.loss], [expected])
    assert_same(grads(out.loss, batch.leaves), grads(expected, batch.leaves))
    for name in ("chosen", "rejected"):
        assert getattr(out, f"{name}_rewards").mean().item() == pytest.approx(logged[f"rewards/{name}"])
        assert getattr(out, f"{name}_logps").mean().item() == pytest.approx(logged[f"logps/{name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_engine(dtype):
    """The engine users get, against fp64 eager logits on the same numbers."""
    batch = Batch(seed=2, dtype=dtype)
    out = linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, bias=batch.bias, ref_hidden=batch.ref_hidden,
        ref_weight=batch.ref_weight, ref_bias=batch.ref_bias, backward="exact",
    )  # fmt: skip
    assert {x.dtype for x in out} == {torch.float32}
    logps = eager_logps(batch.labels, *batch.leaves).sum(1)
    refs = eager_logps(batch.labels, batch.ref_hidden, batch.ref_weight, batch.ref_bias).sum(1)
    expected = preference_loss(logps[:B], logps[B:], refs[:B], refs[B:])
    torch.testing.assert_close(out.losses.double(), expected.losses, rtol=0, atol=2e-6)
    torch.testing.assert_close(out.chosen_logps.double(), logps[:B], rtol=0, atol=2e-5)
    eps = torch.finfo(dtype).eps
    for grad, expected_grad in zip(grads(out.loss, batch.leaves), grads(expected.loss, batch.leaves)):
        assert grad.dtype == dtype
        error = (grad.double() - expected_grad.double()).norm() / expected_grad.double().norm()
        assert error < 2 * eps + 1e-5


def test_transforms_reach_policy_and_reference():
    """logit_scale, softcap and temperature: none accepted and dropped."""
    batch = Batch(seed=3)
    transform = {"logit_scale": 0.7, "softcap": 2.0, "temperature": 1.3}
    out = linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, ref_hidden=batch.ref_hidden, backward="exact", **transform
    )
    logps = eager_logps(batch.labels, batch.hidden, batch.weight, None, **transform).sum(1)
    refs = eager_logps(batch.labels, batch.ref_hidden, batch.weight, None, **transform).sum(1)
    assert_same([out.loss], [preference_loss(logps[:B], logps[B:], refs[:B], refs[B:]).loss])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4}, {"loss_type": "ipo"}], ids=str)
def test_integers_of_either_width(options, dtype, layout, loss_engine):
    """Labels of int32, read as int64, gave another loss."""
    batch = Batch(seed=4)
    hidden, labels, cu_seqlens, offsets = batch.hidden, batch.labels, None, None
    if layout == "packed":
        hidden, labels, cu_seqlens, _ = batch.packed()
        offsets = cu_seqlens.to(dtype)
    arguments = (hidden, batch.weight)
    out = linear_dpo_loss(*arguments, labels.to(dtype), cu_seqlens=offsets, backward="exact", **options)
    logps = eager_logps(batch.labels, batch.hidden, batch.weight, None)
    n = batch.mask.sum(1)
    place = batch.mask.cumsum(1)
    shared = torch.minimum(n[:B], n[B:]).repeat(2)
    alpha = options.get("ld_alpha", 1.0)
    sums = torch.where(place <= shared[:, None], logps, alpha * logps).sum(1)
    expected = preference_loss(sums[:B], sums[B:], loss_type=options["loss_type"][0] if alpha != 1 else "ipo",
                               chosen_lengths=n[:B], rejected_lengths=n[B:]).loss  # fmt: skip
    if alpha != 1:
        expected = expected - logps[:B].sum() / n[:B].sum()
    assert_same([out.loss], [expected])
    assert_same(grads(out.loss, batch.leaves[:2]), grads(expected, batch.leaves[:2]))


def test_average_log_prob():
    batch = Batch(seed=7)
    options = {"loss_type": ["sigmoid", "sft"], "average_log_prob": True}
    out = linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, ref_hidden=batch.ref_hidden, backward="exact", **options
    )
    counts = batch.mask.sum(1)
    logps = eager_logps(batch.labels, batch.hidden, batch.weight, None).sum(1)
    refs = eager_logps(batch.labels, batch.ref_hidden, batch.weight.detach(), None).sum(1) / counts
    mean = logps / counts
    expected = preference_loss(mean[:B], mean[B:], refs[:B], refs[B:]).loss
    expected = expected - logps[:B].sum() / counts[:B].sum()  # sft reads the plain sums
    assert_same([out.loss], [expected])
    assert_same([out.chosen_logps], [mean[:B]])
    assert_same(grads(out.loss, [batch.hidden, batch.weight]), grads(expected, [batch.hidden, batch.weight]))


@pytest.mark.parametrize("options", [{"loss_type": "simpo", "beta": 2.0}, {"loss_type": ["sft", "orpo"]}], ids=str)
def test_reference_free_losses_count_lengths(options):
    batch = Batch(seed=8)
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, **options)
    logps, counts = eager_logps(batch.labels, batch.hidden, batch.weight, None).sum(1), batch.mask.sum(1)
    expected = preference_loss(logps[:B], logps[B:], chosen_lengths=counts[:B], rejected_lengths=counts[B:], **options)
    assert_same(out[:4], expected)


def poisoned(batch):
    """NaN in every row that is not a completion token."""
    hidden = batch.hidden.detach().masked_fill(~batch.mask[..., None], math.nan)
    return hidden.requires_grad_()


def test_masked_rows_are_never_read():
    """NaN in a masked row poisons the batch when masking multiplies by zero."""
    batch = Batch(seed=9)
    hidden = poisoned(batch)
    options = {"ld_alpha": 0.5, "use_weighting": True, "backward": "exact"}
    out = linear_dpo_loss(hidden, batch.weight, batch.labels, ref_hidden=hidden.detach() * 0.5, **options)
    clean = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, ref_hidden=batch.hidden.detach() * 0.5, **options)
    assert_same(out, clean, rtol=0, atol=0)
    dhidden, dweight = grads(out.loss, [hidden, batch.weight])
    assert dhidden.isfinite().all() and dweight.isfinite().all()
    assert (dhidden[~batch.mask] == 0).all()


def test_tail_that_ld_alpha_leaves_out_is_not_read():
    """ld_alpha=0 selects; 0 * NaN would not."""
    batch = Batch(seed=10)
    batch.labels[0, 6] = V + 5  # out of range: NaN in its own row, past the shorter length
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, ld_alpha=0.0)
    assert out.losses.isfinite().all()
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, ld_alpha=0.1)
    assert out.losses.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_nan_stays_in_its_row(layout):
    batch = Batch(seed=11)
    hidden = batch.hidden.detach().clone()
    hidden[1, 3] = math.nan
    batch.hidden = hidden.requires_grad_()
    cu_seqlens, labels = None, batch.labels
    if layout == "packed":
        hidden, labels, cu_seqlens, _ = batch.packed()
    out = linear_dpo_loss(hidden, batch.weight, labels, cu_seqlens=cu_seqlens, loss_type=["sigmoid", "ipo"])
    assert out.losses.isnan().tolist() == [False, True, False]
    assert out.chosen_logps.isnan().tolist() == [False, True, False] and out.rejected_logps.isfinite().all()


def all_ignored(batch):
    return torch.full_like(batch.labels, IGNORE)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft", "simpo", "orpo", "sigmoid_norm"])
@pytest.mark.parametrize("options", [{}, {"use_weighting": True, "ld_alpha": 0.5}], ids=str)
def test_all_ignored(loss_engine, loss_type, options):
    """0 / 0 when every token is masked: zeros and a working backward instead."""
    batch = Batch(seed=12)
    out = linear_dpo_loss(batch.hidden, batch.weight, all_ignored(batch), loss_type=loss_type, **options)
    assert (out.chosen_logps == 0).all() and out.losses.isfinite().all() and out.loss.isfinite()
    for grad in grads(out.loss, [batch.hidden, batch.weight]):
        assert grad is None or (grad == 0).all()


def test_one_sequence_without_completion(loss_engine):
    batch = Batch(seed=13)
    batch.labels[2] = IGNORE
    for layout in ("padded", "packed"):
        hidden, labels, cu_seqlens = batch.hidden, batch.labels, None
        if layout == "packed":
            hidden, labels, cu_seqlens, _ = batch.packed()
        out = linear_dpo_loss(
            hidden, batch.weight, labels, cu_seqlens=cu_seqlens, loss_type=["sigmoid", "sigmoid_norm", "sft"],
            use_weighting=True, ld_alpha=0.5,
        )  # fmt: skip
        assert out.chosen_logps[2] == 0 and out.losses.isfinite().all()
        (dhidden,) = grads(out.loss, [batch.hidden])
        assert (dhidden[2] == 0).all() and dhidden.isfinite().all()


@pytest.mark.parametrize("layout", ["padded", "packed", "no tokens"])
def test_empty_batch(layout):
    weight = torch.randn(V, H, requires_grad=True)
    hidden, labels, cu_seqlens = torch.zeros(0, T, H), torch.zeros(0, T, dtype=torch.int64), None
    if layout != "padded":
        hidden, labels = torch.zeros(0, H), torch.zeros(0, dtype=torch.int64)
        cu_seqlens = torch.zeros(1 if layout == "packed" else 5, dtype=torch.int64)
    hidden.requires_grad_()
    out = linear_dpo_loss(
        hidden,
        weight,
        labels,
        cu_seqlens=cu_seqlens,
        loss_type=["sigmoid", "sft"],
        use_weighting=True,
        ld_alpha=0.5,
    )
    assert out.losses.shape == (2 if layout == "no tokens" else 0,)
    assert out.loss.item() == pytest.approx(math.log(2) if layout == "no tokens" else 0.0)
    out.loss.backward()
    assert weight.grad is None or (weight.grad == 0).all()


@pytest.mark.parametrize("options", [{"average_log_prob": True}, {"loss_type": "ipo"}, {"ld_alpha": 0.3}], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_int32_labels_count_the_same_tokens(engine, layout, options):
    """The preference kernels read int64."""
    batch = Batch(seed=16, dtype=torch.float32)
    hidden, labels, cu_seqlens = batch.hidden, batch.labels, None
    if layout == "packed":
        hidden, labels, cu_seqlens, _ = batch.packed()
    device = torch.zeros(()).device
    given = [None if x is None else x.to(device) for x in (hidden, batch.weight, labels, cu_seqlens)]
    ours, expected = (
        linear_dpo_loss(*given[:2], given[2].to(dtype), cu_seqlens=given[3], **options)
        for dtype in (torch.int32, torch.int64)
    )
    for value, wanted in zip(ours, expected):
        assert torch.equal(value, wanted)


def test_weighting_covers_sft():
    """WPO multiplies whole rows, the batch-wide sft term included."""
    batch = Batch(seed=20)
    arguments = (batch.hidden, batch.weight, batch.labels)
    plain = linear_dpo_loss(*arguments, loss_type=["sigmoid", "sft"])
    weighted = linear_dpo_loss(*arguments, loss_type=["sigmoid", "sft"], use_weighting=True)
    single = linear_dpo_loss(*arguments)
    weights = linear_dpo_loss(*arguments, use_weighting=True).losses / single.losses
    assert_same([weighted.losses], [weights * plain.losses])


def test_frozen_head_gets_no_gradient():
    batch = Batch(seed=14, dtype=torch.float32)
    out = linear_dpo_loss(batch.hidden, batch.weight.detach(), batch.labels, ref_hidden=batch.ref_hidden)
    out.loss.backward()
    assert batch.hidden.grad.isfinite().all() and batch.weight.grad is None


def test_fp32_head_with_bf16_hidden():
    batch = Batch(seed=15, dtype=torch.float32)
    hidden = batch.hidden.detach().bfloat16().requires_grad_()
    out = linear_dpo_loss(hidden, batch.weight, batch.labels, backward="exact")
    out.loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and batch.weight.grad.dtype == torch.float32
    expected = linear_dpo_loss(hidden.detach().float(), batch.weight.detach(), batch.labels)
    torch.testing.assert_close(out.losses, expected.losses)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_repeats_bit_for_bit(layout):
    """The routed backward too, for one seed."""
    results = []
    for _ in range(2):
        batch = Batch(seed=16, dtype=torch.float32)
        hidden, labels, cu_seqlens = batch.hidden, batch.labels, None
        if layout == "packed":
            hidden, labels, cu_seqlens, _ = batch.packed()
        out = linear_dpo_loss(hidden, batch.weight, labels, cu_seqlens=cu_seqlens, seed=7, ld_alpha=0.5)
        results.append([*out, *grads(out.loss, [batch.hidden, batch.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_each_pair_has_its_own_upstream():
    """Upstream gradients of `losses` reach their own sequences: none is multiplied by the first one's."""
    batch = Batch(seed=17)
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, backward="exact")
    upstream = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64)
    (dhidden,) = torch.autograd.grad(out.losses, batch.hidden, upstream, retain_graph=True)
    assert (dhidden[[0, B]] == 0).all()
    for row, factor in ((1, 1.0), (2, -3.0)):
        (unit,) = torch.autograd.grad(out.losses[row], batch.hidden, retain_graph=True)
        assert_same([dhidden[[row, B + row]]], [factor * unit[[row, B + row]]])


def test_sequence_log_probs_carry_gradients():
    batch = Batch(seed=18)
    out = linear_dpo_loss(batch.hidden, batch.weight, batch.labels, backward="exact")
    assert_same(
        grads(out.chosen_logps.sum(), [batch.hidden]),
        grads(eager_logps(batch.labels, batch.hidden, batch.weight, None)[:B].sum(), [batch.hidden]),
    )
    assert not out.chosen_rewards.requires_grad


def test_module():
    batch = Batch(seed=19)
    options = {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "ld_alpha": 0.5,
        "backward": "exact",
    }
    module = LinearDPOLoss(0.3, **options)
    arguments = {"bias": batch.bias, "ref_hidden": batch.ref_hidden}
    out = module(batch.hidden, batch.weight, batch.labels, **arguments)
    assert_same(out, linear_dpo_loss(batch.hidden, batch.weight, batch.labels, beta=0.3, **arguments, **options))
    assert repr(module) == (
        "LinearDPOLoss(beta=0.3, loss_type=['sigmoid', 'sft'], loss_weights=[1.0, 0.5], ld_alpha=0.5, backward='exact')"
    )


OPTIONS_REFUSED = [
    ({"loss_type": "dpo"}, ValueError, "dpo"),
    ({"label_smoothing": 0.7}, ValueError, "label_smoothing.*0.7"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing=0.1.*hinge"),
    ({"simpo_gamma": 2.0}, ValueError, "simpo_gamma=2.0"),
    ({"ld_alpha": 1.5}, ValueError, "ld_alpha.*1.5"),
    ({"ld_alpha": -0.1}, ValueError, "ld_alpha.*-0.1"),
    ({"ld_alpha": "half"}, TypeError, "ld_alpha.*half"),
    ({"use_weighting": 1}, TypeError, "use_weighting.*1"),
    ({"average_log_prob": None}, TypeError, "average_log_prob.*None"),
    ({"use_weighting": True, "loss_type": "aot"}, ValueError, "use_weighting.*aot"),
    ({"average_log_prob": True, "loss_type": ["sft", "ipo"]}, ValueError, "average_log_prob.*ipo"),
    ({"f_divergence": "js_divergence"}, TypeError, "f_divergence'.*f_divergence_type"),
    ({"chosen_lengths": None}, TypeError, "chosen_lengths"),
    ({"backward": "sampled"}, ValueError, "backward.*sampled"),
    ({"softcap": -1.0}, ValueError, "softcap.*-1"),
]


@pytest.mark.parametrize("options,error,message", OPTIONS_REFUSED)
def test_options_refused(options, error, message):
    with pytest.raises(error, match=message):
        LinearDPOLoss(**options)
    batch = Batch()
    with pytest.raises(error, match=message):
        linear_dpo_loss(batch.hidden, batch.weight, batch.labels, **options)


def cut(n):
    return lambda batch: {"hidden": batch.hidden[:n], "labels": batch.labels[:n]}


def packed_with(offsets, dtype=torch.int64):
    return lambda batch: {
        "hidden": batch.hidden[0], "labels": batch.labels[0], "cu_seqlens": torch.tensor(offsets, dtype=dtype)
    }  # fmt: skip


TENSORS_REFUSED = {
    "odd batch": (cut(5), ValueError, "odd number.*5"),
    "shapes": (lambda b: {"labels": b.labels[:, 1:]}, ValueError, r"\(6, 7\)"),
    "flat without offsets": (
        lambda b: {"hidden": b.hidden[0], "labels": b.labels[0]},
        ValueError,
        "cu_seqlens",
    ),
    "padded with offsets": (lambda b: {"cu_seqlens": torch.tensor([0, 3, 6])}, ValueError, "cu_seqlens"),
    "odd packed batch": (packed_with([0, 8]), ValueError, r"2B \+ 1.*\(2,\)"),
    "late start": (packed_with([1, 4, 8]), ValueError, "start at 0; got 1"),
    "early end": (packed_with([0, 4, 7]), ValueError, "8; got 7"),
    "past the end": (packed_with([0, 4, 9]), ValueError, "8; got 9"),
    "decreasing": (packed_with([0, 5, 4, 6, 8]), ValueError, "5 then 4 at position 2"),
    "float offsets": (packed_with([0.0, 4.0, 8.0], torch.float32), TypeError, "cu_seqlens.*float32"),
    "list of offsets": (
        lambda b: {"hidden": b.hidden[0], "labels": b.labels[0], "cu_seqlens": [0, 4, 8]},
        TypeError,
        "list",
    ),
    "labels as list": (lambda b: {"labels": b.labels.tolist()}, TypeError, "labels.*list"),
    "float labels": (lambda b: {"labels": b.labels.float()}, TypeError, "labels.*float32"),
    "head of another width": (lambda b: {"weight": b.weight[:, :-1]}, ValueError, "H = 1[56]"),
}


@pytest.mark.parametrize("name", TENSORS_REFUSED)
def test_tensors_refused(name):
    change, error, message = TENSORS_REFUSED[name]
    batch = Batch()
    arguments = {"hidden": batch.hidden, "weight": batch.weight, "labels": batch.labels} | change(batch)
    with pytest.raises(error, match=message):
        linear_dpo_loss(**arguments)
