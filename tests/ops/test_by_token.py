"""What every engine gives row by row."""

from __future__ import annotations

import pytest
import torch
from heads import small_head

from fastdpo.head import Routing
from fastdpo.ops import reference
from fastdpo.ops.by_token import by_row
from fastdpo.ops.engines import engine_of
from fastdpo.ops.problem import FOLDED, Engine, Head, Needs, Rows, Upstream
from fastdpo.routing import unpack_bits

NEEDS = Needs(True, True, False, False, False)
KEPT, IGNORED, INVALID = [0, 2, 4, 5], [1, 3], [6]


@pytest.fixture
def problem():
    head = small_head(N=7, V=300, H=16).leaves(torch.float32, False)
    labels = head.labels.clone()
    labels[IGNORED], labels[INVALID] = -7, 300
    head = Head(head.hidden, head.weight)
    return head, Rows(labels, -7, 0, 300), Routing.of(0.0, 0.0, torch.tensor(-3))


def call(problem, coef):
    head, rows, routing = problem
    engine = engine_of(head.hidden)
    result = engine.forward(head, rows, stats=frozenset(FOLDED), routing=routing, shards=None)
    return result, engine.backward(head, rows, result, Upstream(coef), routing, NEEDS)


def test_every_row_has_its_place(engine, problem):
    result, grads = call(problem, torch.ones(7))
    for name in ("logps", "lse", "entropy", "mean_logit", "log_sum_sq_probs"):
        values = getattr(result, name)
        assert values.shape == (7,) and values.dtype == torch.float32
        assert (values[IGNORED] == 0).all() and values[INVALID].isnan().all() and values[KEPT].isfinite().all()
    assert result.is_top1.dtype == torch.bool and not result.is_top1[IGNORED + INVALID].any()
    assert result.bitmap.shape == (7, 1) and unpack_bits(result.bitmap, 3).sum(1).tolist() == [3, 0, 3, 0, 3, 3, 0]
    assert grads.hidden.shape == (7, 16)
    assert (grads.hidden[IGNORED] == 0).all() and grads.hidden[INVALID].isnan().all()
    assert grads.hidden[KEPT].isfinite().all() and grads.weight.isfinite().all()


def test_upstream_gradients_of_ignored_rows_are_not_read(engine, problem):
    coef = torch.arange(7.0)
    _, expected = call(problem, coef)
    coef[IGNORED + INVALID] = torch.nan
    _, grads = call(problem, coef)
    torch.testing.assert_close(grads.hidden, expected.hidden, equal_nan=True)
    torch.testing.assert_close(grads.weight, expected.weight)


def test_nothing_ignored_nothing_copied():
    """The adapter passes hidden and every saved tensor on as it got them."""
    leaves = small_head(N=6, V=300).leaves(torch.float32, False)
    head = Head(leaves.hidden.view(2, 3, -1), leaves.weight)
    rows, routing = Rows(leaves.labels, -100, 0, 300), Routing.of(0.0, 0.0, torch.tensor(1))
    seen = {}

    def forward(head, tokens, **options):
        seen["result"] = reference.forward(head, tokens, **options)
        return seen["result"]

    def backward(head, tokens, saved, upstream, routing, needs, sums):
        seen.update(head=head, tokens=tokens, saved=saved, upstream=upstream)
        return reference.backward(head, tokens, saved, upstream, routing, needs, sums)

    spy, coef = by_row(Engine("a spy", forward, backward)), torch.ones(6)
    result = spy.forward(head, rows, stats=frozenset(["entropy"]), routing=routing)
    spy.backward(head, rows, result, Upstream(coef), routing, NEEDS)
    assert seen["head"].hidden.data_ptr() == leaves.hidden.data_ptr() and seen["head"].weight is leaves.weight
    assert seen["tokens"].rows is None and seen["upstream"].coef is coef
    for name in ("logps", "lse", "entropy", "bitmap"):
        assert getattr(seen["saved"], name) is getattr(seen["result"], name)
