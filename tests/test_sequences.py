"""Where sequences lie: the check of layouts, sums over them, and which tokens are within the shorter length."""

import math

import pytest
import torch

from fastdpo.sequences import Sequences, cast, check_layout

IGNORE = -100


def test_sums_of_long_sequences():
    """fp64 inside: one rounding, whatever the length."""
    logps = -torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)) * 1e3
    labels = torch.zeros(2, 5000, dtype=torch.int64)
    exact = [math.fsum(row.tolist()) for row in logps]
    padded = Sequences(labels, IGNORE, None).sum(logps)
    packed = Sequences(labels.flatten(), IGNORE, torch.tensor([0, 5000, 10000])).sum(logps.flatten())
    assert padded.tolist() == pytest.approx(exact, rel=1e-14)
    assert packed.tolist() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("packed", [False, True])
def test_counts_and_shared_length(packed):
    labels = torch.tensor([[IGNORE, 1, 2, 3], [4, IGNORE, IGNORE, IGNORE], [5, 6, IGNORE, IGNORE], [7, IGNORE, 8, 9]])
    offsets = torch.tensor([0, 4, 8, 12, 16], dtype=torch.int32) if packed else None
    sequences = Sequences(labels.flatten() if packed else labels, IGNORE, offsets)
    assert sequences.num == 4 and sequences.counts.tolist() == [3, 1, 2, 3]
    within = sequences.within_shared_length().view(4, 4) & (labels != IGNORE)
    # 2 of the first chosen and rejected sequence, 1 of the second
    assert within.sum(1).tolist() == [2, 1, 2, 1] and within[0].tolist() == [False, True, True, False]
    assert sequences.mean(torch.tensor([6.0, 1.0, 4.0, 3.0])).tolist() == [2.0, 1.0, 2.0, 1.0]


def test_what_is_ignored_is_left_out_not_multiplied():
    labels = torch.tensor([[1, IGNORE], [IGNORE, IGNORE]])
    values = torch.tensor([[2.0, math.nan], [math.inf, math.nan]], requires_grad=True)
    sums = Sequences(labels, IGNORE, None).sum(values)
    sums.sum().backward()
    assert sums.tolist() == [2.0, 0.0] and values.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_offsets_that_nobody_checked_stay_inside():
    sequences = Sequences(torch.zeros(6, dtype=torch.int64), IGNORE, torch.tensor([0, 9, -4]))
    assert sequences.offsets.tolist() == [0, 6, 6] and sequences.counts.tolist() == [6, 0]


def test_casts_keep_what_is_finite():
    x = torch.tensor([1e300, -1e300, math.inf, 2.0], dtype=torch.float64, requires_grad=True)
    y = cast(x, torch.float32)
    largest = torch.finfo(torch.float32).max
    assert y.tolist() == [largest, -largest, math.inf, 2.0]
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0] and cast(y, torch.float32) is y


LAYOUTS_REFUSED = {
    "odd batch": ((5, 8), (5, 8), None, ValueError, "odd number.*5"),
    "shapes": ((4, 8), (4, 7), None, ValueError, r"\(4, 7\)"),
    "flat": ((8,), (8,), None, ValueError, "without cu_seqlens"),
    "padded": ((4, 8), (4, 8), torch.tensor([0, 4, 8]), ValueError, "with cu_seqlens"),
    "even": ((8,), (8,), torch.tensor([0, 8]), ValueError, r"2B \+ 1"),
    "floats": ((8,), (8,), torch.tensor([0.0, 4.0, 8.0]), TypeError, "float32"),
    "start": ((8,), (8,), torch.tensor([1, 4, 8]), ValueError, "start at 0; got 1"),
    "end": ((8,), (8,), torch.tensor([0, 4, 9]), ValueError, "8; got 9"),
    "decreasing": ((8,), (8,), torch.tensor([0, 5, 4, 6, 8]), ValueError, "5 then 4 at position 2"),
}


@pytest.mark.parametrize("name", LAYOUTS_REFUSED)
def test_layouts_refused(name):
    rows, labels, offsets, error, message = LAYOUTS_REFUSED[name]
    with pytest.raises(error, match=message):
        check_layout(torch.zeros(*rows, 3), torch.zeros(labels, dtype=torch.int64), offsets, False)
