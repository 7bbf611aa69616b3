"""Sums of tokens per sequence, in both layouts, and conversions in which nothing finite overflows."""

import math

import pytest
import torch

from fastdpo.sequences import Sequences, cast

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


LABELS = torch.tensor([[7, 7, IGNORE, 7, 7], [IGNORE, IGNORE, 7, 7, IGNORE]])  # 4 tokens and 2


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_shared_length_counts_completion_tokens(layout):
    offsets = torch.tensor([0, 5, 10]) if layout == "packed" else None
    labels = LABELS.flatten() if layout == "packed" else LABELS
    sequences = Sequences(labels, IGNORE, offsets)
    within = sequences.within_shared_length() & (labels != IGNORE)
    expected = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    assert sequences.counts.tolist() == [4, 2] and torch.equal(within.view(2, 5), expected)


def test_offsets_are_bounded():
    """Those of a GPU are not read by the host."""
    offsets = torch.tensor([3, 1, 99])
    assert Sequences(LABELS.flatten(), IGNORE, offsets).offsets.tolist() == [3, 3, 10]


def test_what_is_finite_stays_finite():
    x = torch.tensor([1e300, -1e300, math.inf, math.nan, 2.0], dtype=torch.float64, requires_grad=True)
    y, largest = cast(x, torch.float32), torch.finfo(torch.float32).max
    torch.testing.assert_close(y, torch.tensor([largest, -largest, math.inf, math.nan, 2.0]), equal_nan=True)
    assert cast(y, torch.float32) is y
    half = torch.ones(1, dtype=torch.float16, requires_grad=True)
    (cast(half, torch.float64) * 1e30).sum().backward()
    assert half.grad == torch.finfo(torch.float16).max


def test_once_differentiable():
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(cast(x, torch.float64).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_what_is_ignored_is_left_out_not_multiplied():
    labels = torch.tensor([[1, IGNORE], [IGNORE, IGNORE]])
    values = torch.tensor([[2.0, math.nan], [math.inf, math.nan]], requires_grad=True)
    sums = Sequences(labels, IGNORE, None).sum(values)
    sums.sum().backward()
    assert sums.tolist() == [2.0, 0.0] and values.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]
