"""csrc/cuda/preference.cu executed on the CPU: the bits of the CPU's own losses, and what the templates promise."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import cuda_on_cpu
import pytest
import test_preference
import torch
from ops.preference import test_templates as templates
from preference_cases import names_of

from fastdpo.linear_dpo import _DPOOptions
from fastdpo.losses import LOSSES
from fastdpo.ops import native

RANKED = {name for name, case in test_preference.CASES.items() if any(LOSSES[x].ranked for x in names_of(case))}


def options_of(case: str, weighting: str) -> _DPOOptions | None:
    try:
        return _DPOOptions.of(**templates.CASES[case], **templates.WEIGHTINGS[weighting])
    except ValueError:  # such a loss divides by the length itself
        return None


VALID = [pair for pair in itertools.product(templates.CASES, templates.WEIGHTINGS) if options_of(*pair)]


@pytest.fixture(autouse=True)
def launched(cuda_on_the_cpu):
    """No test passes by what the CPU has of its own."""
    yield
    assert cuda_on_the_cpu


@contextmanager
def cpu_losses():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "EXTENSION", cuda_on_cpu.CPU)
        yield


@pytest.mark.parametrize("case,weighting", VALID)
def test_every_loss_and_weighting_has_the_cpus_bits(case, weighting):
    """One tree of sums on both machines."""
    options = options_of(case, weighting)
    packed, ref = len(case) % 2 == 0, templates.reference_of(templates.CASES[case])
    batch = templates.Batch(packed, ref, torch.float32)
    ours = batch.native(options)
    ours += batch.gradients(ours)
    with cpu_losses():
        expected = batch.native(options)
        expected += batch.gradients(expected)
    for mine, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)


def test_more_pairs_than_lanes_have_the_cpus_bits():
    """The last block walks the batch in two rounds."""
    options = _DPOOptions.of(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    labels = torch.randint(-1, 2, (2 * 300, 5)).masked_fill_(torch.rand(600, 5) < 0.3, -100)
    batch = templates.Batch(False, "tokens", torch.float32)
    batch.labels, batch.log_sum_sq_probs = labels, None
    batch.logps, batch.ref = ((-torch.rand(600, 5)).requires_grad_() for _ in range(2))
    ours = batch.native(options)
    ours += batch.gradients(ours)
    with cpu_losses():
        expected = batch.native(options)
        expected += batch.gradients(expected)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(ours, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ref", [None, "tokens", "sequences"])
def test_layouts_and_references(packed, ref, monkeypatch):
    templates.test_layouts_and_references_in_fp32(packed, ref, monkeypatch)


@pytest.mark.parametrize("layout", ["plain", "strided"])
@pytest.mark.parametrize("form", ["padded", "packed", "per sequence"])
def test_operators_keep_torchs_rules(form, layout):
    templates.test_operators_keep_torchs_rules(form, torch.float32, layout)


def test_nothing_is_written_beside_the_outputs(monkeypatch):
    templates.test_nothing_is_written_beside_the_outputs(torch.float32, monkeypatch)


def test_a_pair_has_the_same_bits_alone_and_among_others():
    templates.test_a_pair_has_the_same_bits_alone_and_among_others()


def test_offsets_nobody_checked_stay_inside():
    templates.test_offsets_nobody_checked_stay_inside()


@pytest.mark.parametrize("name", [name for name in test_preference.CASES if name not in RANKED])
@pytest.mark.parametrize(
    "test",
    [test_preference.test_rounded_once, test_preference.test_extreme_margins_stay_finite],
    ids=["rounded", "far"],
)
def test_every_loss_of_sequences(test, name):
    test(name, torch.float32, "native")


def test_mixed_and_mixed_dtypes():
    test_preference.test_noncontiguous_and_mixed_dtypes("native")
