"""csrc/shared/preference_batch.h, on the CPU lane by lane, against the steps of torch in fp64."""

from __future__ import annotations

import itertools
import math

import preference_cases
import pytest
import torch
from preference_cases import UPSTREAM, grads_of, inputs_of, named, oracle

from fastdpo.linear_dpo import _DPOOptions
from fastdpo.losses import F_DIVERGENCES, LOSSES, PreferenceOptions
from fastdpo.ops import native
from fastdpo.ops.preference import templates as preference_native
from fastdpo.ops.preference.reference import BatchInputs
from fastdpo.ops.preference.templates import batch_losses
from fastdpo.preference import preference_loss

if not native.available():
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)

LENGTHS = [0, 1, 31, 32, 33, 400, 7, 700]  # completion tokens: chosen, then rejected
WEIGHTINGS = {
    "plain": {},
    "ld": {"ld_alpha": 0.3},
    "ld 0": {"ld_alpha": 0.0},
    "wpo": {"use_weighting": True},
    "mean": {"average_log_prob": True},
    "all": {"ld_alpha": 0.5, "use_weighting": True, "average_log_prob": True},
}
CASES = {name: {"loss_type": name} for name, loss in LOSSES.items() if not loss.ranked}
CASES["exo_pair"]["label_smoothing"] = 0.1
CASES |= {
    f"{name}, {kind}": {"loss_type": name, "f_divergence_type": kind}
    for name, kind in itertools.product(("sigmoid", "ipo"), F_DIVERGENCES)
}
CASES["several"] = {"loss_type": ["sft", "sigmoid", "bco_pair"], "loss_weights": [0.7, 1.0, -0.2]}
CASES["kl"] = {"loss_type": "kto", "kto_kl": torch.tensor([0.4]), "desirable_weight": 1.3}
CASES["tdpo beside others"] = {"loss_type": ["tdpo2", "sft", "tdpo1", "hinge"], "tdpo_alpha": 0.7}
CASES["smoothed"] = {"loss_type": ["sigmoid", "simpo"], "label_smoothing": 0.2}


class Batch:
    """Tokens of LENGTHS, and as many prompt tokens, whose log-probs are NaN."""

    def __init__(self, packed: bool, ref: str | None, dtype=torch.float64, scale=1.0):
        rows = []
        for count in LENGTHS:
            labels = torch.full((2 * count + 1,), -100)
            labels[torch.randperm(2 * count + 1)[:count]] = 5
            rows.append(labels)
        self.packed = packed
        if packed:
            self.labels = torch.cat(rows)
            edges = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
            self.cu_seqlens = edges.to(torch.int32 if ref else torch.int64)
        else:
            wide = torch.full((len(rows), 3 + max(map(len, rows))), -100)  # rows of a larger matrix
            for row, labels in zip(wide, rows):
                row[: len(labels)] = labels
            self.labels, self.cu_seqlens = wide[:, 1:], None
            self.labels[:, 0] = -100
        shape, keep = self.labels.shape, self.labels != -100

        def tokens():
            x = scale * -torch.rand(shape, dtype=torch.float64)
            return torch.where(keep, x, torch.nan).to(dtype)

        self.logps = tokens().requires_grad_()
        self.ref = None
        if ref == "tokens":
            self.ref = tokens().requires_grad_()
        elif ref == "sequences":
            self.ref = (-50 * scale * torch.rand(len(rows), dtype=torch.float64)).to(dtype).requires_grad_()
        self.log_sum_sq_probs = torch.where(keep, -torch.rand(shape, dtype=torch.float64), torch.nan).to(dtype)
        self.kl = (-tokens().detach()).requires_grad_()

    def native(self, options):
        ref = self.ref
        if ref is not None and self.cu_seqlens is not None and ref.shape != self.logps.shape:
            ref = ref[:, None]  # per sequence, of packed tokens
        given = BatchInputs(
            self.logps, ref=ref, labels=self.labels, cu_seqlens=self.cu_seqlens,
            kl=self.kl if options.preference.needs_kl() else None,
            log_sum_sq_probs=self.log_sum_sq_probs if options.use_weighting else None,
            average=options.average_log_prob, ld_alpha=options.ld_alpha,
        )  # fmt: skip
        return batch_losses(options.preference, given)

    def steps(self, options, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(preference_native, "problem", lambda device, dtype: "asked for")
            return self.native(options)

    def gradients(self, outputs):
        """Of both ways to a loss, and of the sequences' log-probs."""
        loss, losses, _, _, chosen, rejected = outputs
        g = torch.Generator().manual_seed(1)
        total = loss * 1.7
        for x in (losses, chosen, rejected):
            total = total + (x * torch.randn(x.shape, generator=g).to(x)).sum()
        inputs = [x for x in (self.logps, self.ref, self.kl) if x is not None]
        return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def reference_of(case: dict) -> str | None:
    names = case["loss_type"]
    names = [names] if isinstance(names, str) else names
    return None if all(LOSSES[name].reference_free or name == "sft" for name in names) else "tokens"


def options_of(case, weighting):
    try:
        return _DPOOptions.of(**case, **weighting)
    except ValueError as error:
        assert "divide by the length twice" in str(error)
        pytest.skip("averages twice")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("case", CASES)
def test_every_loss_and_weighting_in_fp64(case, weighting, monkeypatch):
    options = options_of(CASES[case], WEIGHTINGS[weighting])
    batch = Batch(packed=len(case) % 2 == 0, ref=reference_of(CASES[case]))
    ours, expected = batch.native(options), batch.steps(options, monkeypatch)
    for mine, wanted in zip(ours, expected):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    for mine, wanted in zip(batch.gradients(ours), batch.gradients(expected)):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ref", [None, "tokens", "sequences"])
def test_layouts_and_references_in_fp32(packed, ref, monkeypatch):
    options = _DPOOptions.of(ld_alpha=0.5)
    batch = Batch(packed, ref, torch.float32)
    ours, expected = batch.native(options), batch.steps(options, monkeypatch)
    for mine, wanted in zip(ours, expected):
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=1e-6)
    for mine, wanted in zip(batch.gradients(ours), batch.gradients(expected)):
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_margins_stay_finite(case, scale):
    options = _DPOOptions.of(**{"beta": 1.0, **CASES[case]})
    batch = Batch(False, reference_of(CASES[case]), scale=scale)
    outputs = batch.native(options)
    assert all(x.isfinite().all() for x in outputs)
    assert all(x.isfinite().all() for x in batch.gradients(outputs))


def test_a_pair_has_the_same_bits_alone_and_among_others():
    options, batch = _DPOOptions.of(ld_alpha=0.4), Batch(False, "tokens", torch.float32)
    together = batch.native(options)
    half = len(LENGTHS) // 2
    for i in range(half):
        alone = Batch(False, "tokens", torch.float32)
        for name in ("logps", "ref", "labels", "log_sum_sq_probs"):
            setattr(alone, name, getattr(batch, name)[[i, half + i]])
        for mine, one in zip(together[1:], alone.native(options)[1:]):
            assert torch.equal(mine[i], one[0])


def test_offsets_nobody_checked_stay_inside():
    """As a GPU may be given them: rows of no sequence have no gradient, and nothing outside is touched."""
    options, batch = _DPOOptions.of(loss_type="tdpo1"), Batch(True, "tokens", torch.float32)
    batch.cu_seqlens = batch.cu_seqlens.clone()
    batch.cu_seqlens[0], batch.cu_seqlens[3], batch.cu_seqlens[-1] = 1, -7, 10**6
    outputs = batch.native(options)
    batch.cu_seqlens[-1] = 1300
    gradients = batch.gradients(batch.native(options))
    assert outputs[1].isfinite().all() and len(gradients) == 3
    for x in gradients:
        assert (x[:1] == 0).all() and (x[1300:] == 0).all() and (x != 0).any()


def test_nan_stays_in_its_pair():
    options, batch = _DPOOptions.of(), Batch(False, "tokens")
    with torch.no_grad():
        batch.logps[2, (batch.labels[2] != -100).nonzero()[0]] = math.nan
    losses = batch.native(options)[1]
    assert losses[2].isnan() and losses[[0, 1, 3]].isfinite().all()


def spread(x):
    """The same numbers in a layout of their own: rows last, and every other element."""
    if x is None:
        return None
    wide = x.new_zeros(*x.shape[::-1], 2)[..., 1].permute(tuple(range(x.ndim))[::-1])
    return wide.copy_(x.detach()).detach().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("layout", ["plain", "strided", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["padded", "packed", "per sequence"])
def test_operators_keep_torchs_rules(form, dtype, layout):
    """And what autograd calls without them has the same bits; integers of either width."""
    options, batch = (
        _DPOOptions.of(ld_alpha=0.5, loss_type=["sigmoid", "sft", "tdpo1"]),
        Batch(form == "packed", "tokens"),
    )
    tensors = [batch.logps, None, batch.ref, None, batch.kl, None, batch.labels.int(), batch.cu_seqlens, *[None] * 4]
    if form == "per sequence":
        options = _DPOOptions.of(loss_type=["ipo", "kto", "sft", "tdpo2"])
        logps = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(6)]
        lengths = [torch.tensor([3, 0, 1, 7]), torch.tensor([2, 2, 9, 1])]
        tensors = [*logps, None, None, *lengths, None, torch.tensor(0.3, dtype=torch.float64)]
    if layout == "empty":
        tensors = [x if x is None or x.ndim == 0 else x.detach()[:0].requires_grad_(x.requires_grad) for x in tensors]
        if form == "packed":
            tensors[7] = torch.zeros(1, dtype=torch.int64)
    tensors[:6] = [None if x is None else x.detach().nan_to_num().to(dtype).requires_grad_() for x in tensors[:6]]
    if layout == "strided":
        tensors = [spread(x) for x in tensors]
    spec = preference_native.Spec.of(options.preference, BatchInputs(tensors[0], ld_alpha=options.ld_alpha))
    detached = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(preference_native.preference_forward_op, (*detached, *spec))
    loss, losses, _, _, chosen, _, partials, sums = preference_native.preference_forward_op(*detached, *spec)
    assert loss.isfinite() and (layout != "empty" or loss == 0)
    results = preference_native._BatchLosses.apply(spec, *tensors)
    for mine, wanted in zip(results, (loss, losses)):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    loss, losses, _, _, chosen, _ = results
    detached = detached[:8]
    upstream = (torch.tensor(0.5, dtype=dtype), torch.randn_like(losses), None, torch.randn_like(chosen))
    wanted = [x is not None for x in detached[:6]]
    rest = (-100, spec.average, spec.ld_alpha, spec.sft_weight)
    arguments = (partials, sums, *detached, *upstream, wanted, *rest)
    torch.library.opcheck(preference_native.preference_backward_op, arguments)
    inputs = [x for x in tensors[:6] if x is not None]
    total = upstream[0] * loss + (upstream[1] * losses).sum() + (upstream[3] * chosen).sum()
    swapped = (*upstream[:2], upstream[3], None)
    expected = preference_native.preference_backward_op(partials, sums, *detached, *swapped, wanted, *rest)
    for mine, wanted in zip(torch.autograd.grad(total, inputs), expected):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", preference_cases.CASES)
def test_every_loss_of_sequences_in_fp64(name):
    case = preference_cases.CASES[name]
    for scale, seed in ((1.0, 1), (60.0, 2)):
        tensors, lengths = inputs_of(case, scale=scale, seed=seed)
        expected = oracle(tensors, lengths, **case)
        out = preference_loss(**named(tensors), **case, **lengths)
        torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=1e-12)
        expected_grads = grads_of(expected, tensors, UPSTREAM)
        for grad, expected_grad in zip(grads_of(out.losses, tensors, UPSTREAM), expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


FITTING = {
    "chosen": torch.zeros(3),
    "rejected": torch.ones(3),
    "ref_chosen": None,
    "ref_rejected": None,
    "chosen_lengths": None,
    "rejected_lengths": None,
    "options": PreferenceOptions(),
}


def test_the_exported_function_is_preference_loss():
    for name in ("sigmoid", "mpo", "ranked and rowwise", "tdpo1+others"):
        case = preference_cases.CASES[name]
        tensors, lengths = inputs_of(case)
        losses = preference_native.PreferenceLossFunction.apply(
            *tensors[:4], *lengths.values(), PreferenceOptions(**case), *tensors[4:]
        )
        assert torch.equal(losses, preference_loss(**named(tensors), **case, **lengths).losses)
        assert grads_of(losses, tensors, UPSTREAM)[0].isfinite().all()


UNFIT = {
    "shapes": ({"rejected": torch.ones(4)}, ValueError, r"rejected_logps must be shaped like .* \(3,\); got \(4,\)"),
    "dimensions": ({"chosen": torch.zeros(3, 1)}, ValueError, "chosen_logps must be 1-D"),
    "integers": ({"chosen": torch.zeros(3, dtype=torch.int64)}, TypeError, "chosen_logps must be fp32, .*int64"),
    "device": ({"rejected": torch.ones(3, device="meta")}, ValueError, "rejected_logps is on meta"),
    "one reference": ({"ref_rejected": torch.zeros(3)}, ValueError, "ref_chosen_logps is None"),
    "no lengths": ({"options": PreferenceOptions(loss_type="ipo")}, ValueError, "chosen_lengths is None, .*'ipo'"),
    "lengths' shape": ({"chosen_lengths": torch.ones(2).long()}, ValueError, r"chosen_lengths must be .*\(2,\)"),
    "lengths' type": ({"rejected_lengths": torch.ones(3)}, TypeError, "rejected_lengths must be .*integers; got"),
    "list": ({"chosen": [0.0, 0.0, 0.0]}, TypeError, "chosen_logps must be a torch.Tensor; got list"),
    "dictionary": ({"options": {"beta": 0.1}}, TypeError, "options must be PreferenceOptions; got {'beta': 0.1}"),
    "specification": ({"options": None}, TypeError, "options must be PreferenceOptions; got None"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_the_exported_function_checks_what_the_public_one_does(what):
    """It handed on what it was given: 3 log-probs beside 4 were read out of bounds."""
    change, error, message = UNFIT[what]
    with pytest.raises(error, match=message):
        preference_native.PreferenceLossFunction.apply(*(FITTING | change).values())


def test_the_exported_function_takes_any_log_probs():
    """Of mixed types, lengths of any integers: converted, where they were read as what they should be."""
    lengths = torch.tensor([2, 3, 4])
    options = PreferenceOptions(loss_type="ipo")
    apply = preference_native.PreferenceLossFunction.apply
    losses = apply(torch.zeros(3).half(), torch.ones(3), None, None, lengths.short(), lengths.int(), options)
    assert torch.equal(losses, apply(torch.zeros(3), torch.ones(3), None, None, lengths, lengths, options))


WRONG = {
    "rejected": torch.zeros(5),
    "ref": torch.zeros(4, dtype=torch.float64),
    "ref_rejected": torch.zeros(3),
    "kl": torch.zeros(5),
    "kl_rejected": torch.zeros(4, dtype=torch.float64),
    "chosen_lengths": torch.ones(4, dtype=torch.int32),
    "rejected_lengths": torch.ones(2, dtype=torch.int64),
    "log_sum_sq_probs": torch.zeros(4, dtype=torch.float16),
    "kto_kl": torch.zeros(()),
    "labels": torch.ones(4, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_operator_checks_what_native_code_reads(name):
    """Its addresses are read as what they should be."""
    order = ("rejected", "ref", "ref_rejected", "kl", "kl_rejected", "labels", "cu_seqlens", "chosen_lengths",
             "rejected_lengths", "log_sum_sq_probs", "kto_kl")  # fmt: skip
    given = {"rejected": torch.zeros(4), "ref": torch.zeros(4), "ref_rejected": torch.zeros(4), name: WRONG[name]}
    spec = preference_native.Spec.of(PreferenceOptions(), BatchInputs(torch.zeros(4)))
    with pytest.raises(ValueError, match=f"{name} must be"):
        preference_native.preference_forward_op(torch.zeros(4), *(given.get(x) for x in order), *spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_written_beside_the_outputs(dtype, monkeypatch):
    """Every output is a window into a larger buffer."""
    batch = Batch(False, "tokens", dtype)
    buffers = []

    def banded(shape, kind):
        size, item = math.prod(shape), torch.empty((), dtype=kind).element_size()
        buffer = torch.full((size * item + 128,), 0x55, dtype=torch.uint8)
        buffers.append(buffer)
        return buffer[64 : 64 + size * item].view(kind).view(shape)

    def results(logps, pairs):
        shapes = [(), *[(pairs,)] * 5]
        return (
            *(banded(shape, logps.dtype) for shape in shapes),
            banded((preference_native.PARTIALS, pairs), torch.float64),
            banded((pairs, preference_native.SUMS_BYTES), torch.uint8),
        )

    monkeypatch.setattr(preference_native, "_results", results)
    before = [x.detach().clone() for x in (batch.logps, batch.ref, batch.labels)]
    spec = preference_native.Spec.of(PreferenceOptions(), BatchInputs(torch.zeros(4)))
    preference_native._forward(
        batch.logps.detach(), None, batch.ref.detach(), None, *[None] * 2, batch.labels, *[None] * 5, *spec
    )
    assert len(buffers) == 8
    for buffer in buffers:
        assert (buffer[:64] == 0x55).all() and (buffer[-64:] == 0x55).all()
        assert (buffer[64:-64] != 0x55).any()
    for x, y in zip(before, (batch.logps, batch.ref, batch.labels)):
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(
    not torch.cuda.is_available() or native.cuda_problem() is not None,
    reason=f"needs a CUDA GPU and the CUDA kernels ({native.cuda_problem()})",
)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_computes_what_the_cpu_does(case, weighting):
    options = options_of(CASES[case], WEIGHTINGS[weighting])
    batch = Batch(packed=len(case) % 2 == 0, ref=reference_of(CASES[case]), dtype=torch.float32)
    expected = batch.native(options)
    wanted = batch.gradients(expected)
    for name in ("logps", "ref", "kl", "labels", "cu_seqlens", "log_sum_sq_probs"):
        x = getattr(batch, name)
        if x is not None:
            setattr(batch, name, x.detach().cuda().requires_grad_(x.requires_grad))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = batch.native(options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = batch.native(options)
    assert all(torch.equal(x, y) for x, y in zip(ours, again))
    for mine, one in zip((*ours, *batch.gradients(ours)), (*expected, *wanted)):
        torch.testing.assert_close(mine.cpu(), one, rtol=3e-7, atol=1e-7)
