"""Two heads row by row: where an engine's results belong, whatever lies between."""

from __future__ import annotations

import torch
from divergence_cases import two_heads

from fastdpo.head import Routing
from fastdpo.ops.divergence.problem import DivergenceUpstream, Heads
from fastdpo.ops.engines import divergence_engine
from fastdpo.ops.problem import Head, Needs, Rows
from fastdpo.routing import unpack_bits

KEPT, IGNORED, INVALID = [0, 2, 4, 5], [1, 3], [6]


def problem():
    heads = two_heads(shape=(7,), V=300, H=16)
    labels = torch.arange(7)
    labels[IGNORED], labels[INVALID] = -7, 300
    head = Head(heads.hidden.detach(), heads.weight.detach())
    teacher = Head(heads.ref_hidden, heads.ref_weight)
    found = Heads(head, teacher, "reverse_kl", 0.5, True, False)
    return found, Rows(labels, -7, 0, 300), Routing.of(0.0, 0.0, torch.tensor(-3))


def call(heads, rows, routing, coef):
    engine = divergence_engine(heads.student.hidden.device, torch.float32)
    saved = engine.forward(heads, rows, stats=frozenset(), routing=routing, shards=None)
    upstream = DivergenceUpstream(coef, torch.zeros_like(coef))
    return saved, engine.backward(heads, rows, saved, upstream, routing, Needs(True, True), None)


def test_every_row_has_its_place(engine):
    saved, grads = call(*problem(), torch.ones(7))
    for name in ("divergence", "lse", "ref_lse", "mean", "logps", "ref_logps", "total"):
        values = getattr(saved, name)
        assert values.shape == (7,) and values.dtype == torch.float32
        assert (values[IGNORED] == 0).all() and values[INVALID].isnan().all() and values[KEPT].isfinite().all()
    assert saved.entropy is None
    assert unpack_bits(saved.bitmap, 3).sum(1).tolist() == [3, 0, 3, 0, 3, 3, 0]
    assert (grads.hidden[IGNORED] == 0).all() and grads.hidden[INVALID].isnan().all()
    assert grads.hidden[KEPT].isfinite().all() and grads.weight.isfinite().all()


def test_upstream_gradients_of_ignored_rows_are_not_read(engine):
    given, coef = problem(), torch.arange(7.0)
    for routing in (given[2], None):
        _, expected = call(*given[:2], routing, coef)
        poisoned = coef.clone()
        poisoned[IGNORED + INVALID] = torch.nan
        _, grads = call(*given[:2], routing, poisoned)
        torch.testing.assert_close(grads.hidden, expected.hidden, equal_nan=True)
        torch.testing.assert_close(grads.weight, expected.weight)


def test_a_mask_has_no_label(engine):
    """Rows.labels only says what counts: no logp of id 0, and no block that is kept for it."""
    heads, *rest = problem()
    saved, _ = call(heads.replace(labelled=False), *rest, torch.ones(7))
    assert saved.logps is None and saved.ref_logps is None
    labelled, _ = call(heads, *rest, torch.ones(7))
    torch.testing.assert_close(saved.divergence, labelled.divergence, equal_nan=True)
