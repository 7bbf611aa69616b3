"""Microbatches that hold whole pairs, and the refusal of those that do not, in one process."""

from __future__ import annotations

import pytest
import torch

from fastdpo.microbatches import interleave, paired, restore


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
def test_every_piece_is_a_batch_of_the_same_pairs_and_the_order_comes_back(chunks):
    rows = torch.arange(12)
    batch = {"ids": torch.randn(5, 12).T, "more": (rows, [rows[:, None, None].expand(12, 2, 3), None])}
    ordered = interleave(batch, chunks)
    seen = []
    for piece in ordered["more"][0].tensor_split(chunks):  # as torch.distributed.pipelining cuts
        chosen, rejected = piece.chunk(2)
        assert torch.equal(rejected, chosen + 6)
        seen += chosen.tolist()
    assert seen == list(range(6))
    assert torch.equal(ordered["ids"], batch["ids"][ordered["more"][0]])
    assert ordered["more"][1][1] is None
    back = restore(ordered, chunks)
    assert torch.equal(back["ids"], batch["ids"])
    assert torch.equal(back["more"][1][0], batch["more"][1][0])


def test_interleave_is_differentiable():
    x, coef = torch.randn(8, 2, requires_grad=True), torch.arange(8.0)[:, None]
    (interleave(x, 2) * coef).sum().backward()
    assert torch.equal(x.grad, restore(coef, 2).expand(8, 2))


@pytest.mark.parametrize(
    "batch, chunks, error, message",
    [
        (torch.zeros(12, 2), 4, ValueError, r"multiple of 4 chunks; got a tensor of shape \(12, 2\)"),
        ([torch.zeros(12), torch.zeros(1, 12)], 3, ValueError, r"got a tensor of shape \(1, 12\)"),
        (torch.zeros(()), 1, ValueError, r"got a tensor of shape \(\)"),
        (torch.zeros(12), 0, ValueError, "chunks must lie in .*; got 0"),
        (torch.zeros(12), 2.0, TypeError, "must be an int; got 2.0"),
        ({"ids": torch.zeros(12), "mask": "causal"}, 2, TypeError, "or None; got str"),
    ],
)
def test_what_cannot_be_cut_into_pairs_is_refused_by_name(batch, chunks, error, message):
    for function in (interleave, restore):
        with pytest.raises(error, match=message):
            function(batch, chunks)


def _loss(output, labels, ref_logps=None):
    return output, labels, ref_logps


LABELS = torch.arange(8) * 10


def test_a_loss_sees_its_rows_of_the_whole_batch():
    rows = interleave(torch.arange(8), 2)[4:]
    output, labels, ref_logps = paired(_loss)(torch.ones(4, 1), rows, labels=LABELS, ref_logps=None)
    assert labels.tolist() == [20, 30, 60, 70] and ref_logps is None and len(output) == 4


@pytest.mark.parametrize(
    "rows, message",
    [
        ([0, 1, 2, 3], r"it has the rows \[0, 1, 2, 3\] of 8, of which those below 4 are chosen"),  # torch's own cut
        ([4, 5, 6, 7], r"\[4, 5, 6, 7\]"),
        ([0, 4, 1, 5], r"\[0, 4, 1, 5\]"),
        ([0, 1, 5, 4], r"\[0, 1, 5, 4\]"),
        ([4, 5, 0, 1], r"\[4, 5, 0, 1\]"),
        ([0, 1, 4], r"\[0, 1, 4\]"),
        ([3], r"\[3\]"),
        ([-1, 3], r"\[-1, 3\]"),
    ],
)
def test_a_microbatch_without_its_rejected_half_raises(rows, message):
    with pytest.raises(ValueError, match=message):
        paired(_loss)(torch.zeros(len(rows), 1), torch.tensor(rows), labels=LABELS)


@pytest.mark.parametrize(
    "rows, batch, error, message",
    [
        (LABELS[:4, None], {"labels": LABELS}, TypeError, r"torch.arange\(8\).*got torch.int64 \(4, 1\)"),
        (torch.zeros(4), {"labels": LABELS}, TypeError, "got torch.float32"),
        (torch.tensor([0, 4]), {"labels": LABELS}, ValueError, "must have 2 rows"),
        (torch.tensor([0, 1, 4, 5]), {"labels": LABELS, "ref_logps": LABELS[:4]}, ValueError, "'ref_logps': 4"),
        (torch.tensor([0, 1, 4, 5]), {"labels": LABELS[:7]}, ValueError, "'labels': 7"),
        (torch.tensor([0, 1, 4, 5]), {}, ValueError, "got rows {}"),
        (torch.tensor([0, 1, 4, 5]), {"labels": LABELS, "beta": 0.1}, TypeError, r"loss_kwargs\['beta'\].*float"),
    ],
)
def test_what_a_loss_cannot_look_up_is_refused_by_name(rows, batch, error, message):
    with pytest.raises(error, match=message):
        paired(_loss)(torch.zeros(4, 1), rows, **batch)
