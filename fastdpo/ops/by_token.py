"""An engine by row from one by token.

By row nothing depends on how many labels are ignored, so nothing has to wait for the device. The adapter does count:
its engines are the CPU's, and the reference for what no other engine takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from ..head import Routing
from ..tensors import in_rows
from .problem import Engine, Forward, Gradients, Head, Needs, Rows, Tokens, Upstream


def by_row(engine: Engine) -> Engine:
    """`engine`, whose forward and backward take Tokens for Rows."""
    return Engine(engine.name, partial(_forward, engine.forward), partial(_backward, engine.backward))


def _forward(
    of_tokens: Callable, head: Head, rows: Rows, *, stats: frozenset[str], routing: Routing | None, shards=None
) -> Forward:
    head, tokens, invalid = completion_tokens(head, rows)
    if routing is not None:
        routing = routing._replace(seed=int(routing.seed) % 2**64)
    result = of_tokens(head, tokens, stats=stats, routing=routing, shards=shards)
    return result if tokens.rows is None else each(result, lambda values: spread(values, tokens, invalid))


def _backward(
    of_tokens: Callable,
    head: Head,
    rows: Rows,
    saved: Forward,
    upstream: Upstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    head, tokens, invalid = completion_tokens(head, rows)
    if tokens.rows is not None:
        saved, upstream = (each(x, lambda values: values.index_select(0, tokens.rows)) for x in (saved, upstream))
    if routing is None:
        tokens, saved, upstream, _ = with_gradient(tokens, saved, upstream)
    grads = of_tokens(head, tokens, saved, upstream, routing, needs, sums)
    if invalid is not None and grads.hidden is not None:
        grads.hidden[invalid] = torch.nan
    return grads


def each(tensors, function: Callable[[Tensor], Tensor]):
    """`function` of every tensor of such a dataclass as Forward or Upstream."""
    values = {field.name: getattr(tensors, field.name) for field in fields(tensors)}
    return replace(tensors, **{name: function(x) for name, x in values.items() if x is not None})


def as_rows(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """([*, H] with rows apart, row of it per flat row of `hidden` or None when they are the same).

    The usual slice ``hidden[:, :-1]`` has no flat view, but its rows lie at whole multiples of one stride: address
    them there instead of copying.
    """
    size = hidden.shape[-1]
    if hidden.is_contiguous():
        return hidden.view(-1, size), None
    step = hidden.stride(-2) if hidden.ndim > 2 else 0
    aligned = step >= size and all(stride % step == 0 for stride in hidden.stride()[:-1])
    if not aligned or hidden.numel() == 0:
        return in_rows(hidden.reshape(-1, size), apart=True), None
    rows = torch.zeros((), dtype=torch.int64, device=hidden.device)
    last = 0
    for length, stride in zip(hidden.shape[:-1], hidden.stride()[:-1]):
        rows = rows[..., None] + torch.arange(length, device=hidden.device) * (stride // step)
        last += (length - 1) * (stride // step)
    return hidden.as_strided((last + 1, size), (step, 1)), rows.reshape(-1)


def completion_tokens(head: Head, rows: Rows) -> tuple[Head, Tokens, Tensor | None]:
    """(head with rows apart, tokens to score, rows whose label is out of range or None)."""
    hidden, source_rows = as_rows(head.hidden)
    ignored = rows.labels == rows.ignore_index
    out_of_range = ((rows.labels < 0) | (rows.labels >= rows.vocab_size)) & ~ignored
    invalid = out_of_range.nonzero()[:, 0] if out_of_range.any() else None
    skipped = ignored | out_of_range
    kept = (~skipped).nonzero()[:, 0] if skipped.any() else None
    labels = rows.labels if kept is None else rows.labels[kept]
    if source_rows is None:
        source_rows = kept
    elif kept is not None:
        source_rows = source_rows[kept]
    tokens = Tokens(labels.long() - rows.vocab_start, kept, source_rows, rows.labels.shape[0])
    return replace(head, hidden=hidden), tokens, invalid


def with_gradient(tokens: Tokens, saved, upstream) -> tuple:
    """(tokens, saved, upstream, which they are or None) of those alone that have an upstream gradient: the exact
    backward of the others is zero."""
    active = None
    for field in fields(upstream):
        coef = getattr(upstream, field.name)
        if coef is not None:
            active = coef != 0 if active is None else active | (coef != 0)
    if active.all():
        return tokens, saved, upstream, None
    keep = active.nonzero()[:, 0]
    saved, upstream = (each(x, lambda values: values.index_select(0, keep)) for x in (saved, upstream))
    return picked(tokens, keep), saved, upstream, keep


def picked(tokens: Tokens, keep: Tensor | None) -> Tokens:
    if keep is None:
        return tokens

    def pick_rows(rows: Tensor | None) -> Tensor:
        return keep if rows is None else rows[keep]

    return Tokens(tokens.labels[keep], pick_rows(tokens.rows), pick_rows(tokens.source_rows), tokens.num_rows)


def spread(values: Tensor, tokens: Tokens, invalid: Tensor | None) -> Tensor:
    """Per-token values -> per row: 0 where ignored, NaN (False, no bits) where the label is out of range."""
    out = values.new_zeros(tokens.num_rows, *values.shape[1:])
    out[tokens.rows] = values
    if invalid is not None and values.is_floating_point():
        out[invalid] = torch.nan
    return out
