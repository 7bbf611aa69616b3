"""Which rows are tokens, their hidden states, and back to rows."""

from __future__ import annotations

import pytest
import torch
from triton_case import DEVICE

from fastdpo.ops.problem import Head, Rows
from fastdpo.ops.triton import tokens as wing
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import TokenRange
from fastdpo.ops.triton.stats import Results

N, V, H = 2500, 300, 20  # more rows than a program has


def call_of(labels: torch.Tensor) -> Call:
    hidden = torch.randn(5, N // 5 + 1, H, device=DEVICE)[:, 1:]  # the caller's strides
    return Call(Head(hidden, torch.randn(V, H, device=DEVICE)), Rows(labels.to(DEVICE), -100, 0, V))


def test_tokens_of_labels_and_of_upstream_gradients():
    labels = torch.randint(0, V, (N,))
    labels[torch.rand(N) < 0.4] = -100
    labels[7], labels[2400] = V, -3
    call = call_of(labels)
    results = Results.empty({"is_top1", "entropy"}, N, call.device)
    scored = (labels >= 0) & (labels < V)
    rows = scored.nonzero()[:, 0]
    tokens = wing.compact(call, results)
    assert tokens.count.item() == len(rows)
    assert torch.equal(tokens.rows[: len(rows)].cpu(), rows.int())
    assert torch.equal(tokens.labels[: len(rows)].cpu(), labels[rows].int())
    position = torch.where(labels == -100, -1, -2).int()
    position[rows] = torch.arange(len(rows), dtype=torch.int32)
    assert torch.equal(tokens.token_of_row.cpu(), position)
    nothing = torch.where(position == -2, torch.nan, 0.0)[~scored]
    for x in (results.logps, results.lse, results.entropy):
        torch.testing.assert_close(x.cpu()[~scored], nothing, equal_nan=True)
    assert not results.is_top1.cpu()[~scored].any() and results.mean_logit is None

    coef, coef_entropy = torch.zeros(2, N)
    coef[::3], coef_entropy[::5] = 1.0, 1.0
    few = (scored & ((coef != 0) | (coef_entropy != 0))).nonzero()[:, 0]
    tokens = wing.compact(call, coef=coef.to(DEVICE), coef_entropy=coef_entropy.to(DEVICE))
    assert torch.equal(tokens.rows[: tokens.count.item()].cpu(), few.int())


def test_gathered_rows():
    labels = torch.randint(0, V, (N,))
    labels[::2], labels[9] = -100, V
    call = call_of(labels)
    tokens = wing.compact(call)
    rows = ((labels >= 0) & (labels < V)).nonzero()[:, 0]
    flat = call.head.hidden.reshape(N, H).cpu()
    for first in (0, 640):
        part = TokenRange(tokens, first, 640)
        mine = rows[first : first + 640]
        gathered = torch.full((640, call.pitch), 5.0, device=DEVICE)
        if first:
            wing.gather(call, part, gathered)
        else:
            wing.compact(call, first=gathered)
        assert torch.equal(gathered[: len(mine), :H].cpu(), flat[mine])
        assert (gathered[len(mine) :] == 5.0).all() and not gathered[: len(mine), H:].any()


@pytest.mark.parametrize("sets", [1, 2])
def test_rows_without_a_token_keep_no_pair(sets):
    labels = torch.randint(0, V, (N,))
    labels[torch.rand(N) < 0.4], labels[9] = -100, V
    call = call_of(labels)
    bitmap = torch.full((N, sets * 3), 255, dtype=torch.uint8, device=DEVICE)
    most_pairs = torch.full((N,), 7, dtype=torch.int32, device=DEVICE)
    wing.compact(call, pairs=wing.Pairs(bitmap, most_pairs))
    scored = ((labels >= 0) & (labels < V)).to(DEVICE)
    assert not bitmap[~scored].any() and not most_pairs[~scored].any()
    assert (bitmap[scored] == 255).all() and (most_pairs[scored] == 7).all()
