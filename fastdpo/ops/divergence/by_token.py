"""../by_token.py for two heads: their hidden states lie each in their own way, the completion tokens are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ...head import Routing
from ..by_token import completion_tokens, each, picked, spread, with_gradient
from ..problem import Gradients, Needs, Rows, Tokens
from .problem import DivergenceEngine, DivergenceForward, DivergenceUpstream, Heads


def by_row(engine: DivergenceEngine) -> DivergenceEngine:
    """`engine`, whose forward and backward take two Tokens, of the student and of the teacher, for Rows."""
    return DivergenceEngine(engine.name, partial(_forward, engine.forward), partial(_backward, engine.backward))


def _tokens(heads: Heads, rows: Rows) -> tuple[Heads, Tokens, Tokens, torch.Tensor | None]:
    student, tokens, invalid = completion_tokens(heads.student, rows)
    teacher, ref_tokens, _ = completion_tokens(heads.teacher, rows)
    if not heads.labelled:
        tokens = replace(tokens, labels=torch.full_like(tokens.labels, -1))
    return heads.replace(student=student, teacher=teacher), tokens, ref_tokens, invalid


def _forward(
    of_tokens: Callable, heads: Heads, rows: Rows, *, stats: frozenset[str], routing: Routing | None, shards=None
) -> DivergenceForward:
    heads, tokens, ref_tokens, invalid = _tokens(heads, rows)
    if routing is not None:
        routing = routing._replace(seed=int(routing.seed) % 2**64)
    result = of_tokens(heads, tokens, ref_tokens, stats=stats, routing=routing, shards=shards)
    return result if tokens.rows is None else each(result, lambda values: spread(values, tokens, invalid))


def _backward(
    of_tokens: Callable,
    heads: Heads,
    rows: Rows,
    saved: DivergenceForward,
    upstream: DivergenceUpstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    heads, tokens, ref_tokens, invalid = _tokens(heads, rows)
    if tokens.rows is not None:
        saved, upstream = (each(x, lambda values: values.index_select(0, tokens.rows)) for x in (saved, upstream))
    if routing is None:
        tokens, saved, upstream, keep = with_gradient(tokens, saved, upstream)
        ref_tokens = picked(ref_tokens, keep)
    grads = of_tokens(heads, tokens, ref_tokens, saved, upstream, routing, needs, sums)
    if invalid is not None and grads.hidden is not None:
        grads.hidden[invalid] = torch.nan
    return grads
