"""Several labels a row, around an engine that takes one.

    z[n, k] = the logit of labels[n, k]          y* = the row's label with the largest, which the engine takes
    logps[n, k] = logp(y*) + z[n, k] - z[n, y*]          no digits are lost: only y* can have p > 1/2
    dz = sum_k coef_k (e_k - p) = a e_* + sum_{k: not y*} coef_k e_k - (sum_k coef_k) p          a: of y*, however often

The engine computes what y* and p bring, the latter as a gradient of lse; entries, a row and one of its labels each, are
left, and a gradient of them is an outer product: dhidden[n] += dz weight[label], dweight[label] += dz hidden[n].
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..head import Routing
from .engines import entries_of
from .problem import Engine, Forward, Gradients, Head, Needs, Rows, Upstream

SUMS_BYTES = 32 << 20  # fp32 sums of dhidden in half types, rounded once: more rows are summed in ranges


class _Labels(NamedTuple):
    """What a row's labels are, all [M, K] but `star`."""

    ids: Tensor  # int64
    ignored: Tensor
    invalid: Tensor  # out of range

    @staticmethod
    def of(rows: Rows) -> _Labels:
        ids = rows.labels.long()
        ignored = ids == rows.ignore_index
        return _Labels(ids, ignored, ((ids < 0) | (ids >= rows.vocab_size)) & ~ignored)

    @property
    def valid(self) -> Tensor:
        return ~(self.ignored | self.invalid)

    def star(self, z: Tensor) -> Tensor:
        """[M] the id with the largest logit, of equal ones the first of the vocabulary; of a row without a valid
        label one out of range or, where all are ignored, that."""
        valid = self.valid
        most = z.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        largest = valid & ((z == most) | most.isnan())
        star = self.ids.masked_fill(~largest, torch.iinfo(torch.int64).max).amin(1)
        other = self.ids.gather(1, self.invalid.int().argmax(1, keepdim=True))[:, 0]
        return torch.where(valid.any(1), star, other)

    def columns(self, rows: Rows, head: Head) -> Tensor:
        """[M, K] column of this shard's weight; -1 where there is none."""
        columns = self.ids - rows.vocab_start
        here = self.valid & (columns >= 0) & (columns < head.weight.shape[0])
        return columns.masked_fill_(~here, -1)


def forward(engine: Engine, head: Head, rows: Rows, *, stats, routing: Routing | None, shards=None) -> Forward:
    """As the engine's, of `rows` with [M, K] labels."""
    labels = _Labels.of(rows)
    z = entries_of(engine).logits(head, labels.columns(rows, head))
    if shards is not None:
        z = torch.cat([shards.label_logit(part) for part in z.split(_rows_at_once(z))])
    star = labels.star(z)
    result = engine.forward(head, rows.replace(labels=star), stats=stats, routing=routing, shards=shards)
    valid, is_star = labels.valid, labels.ids == star[:, None]
    of_star = z.masked_fill(~(valid & is_star), -torch.inf).amax(1, keepdim=True)
    below = torch.where(z == of_star, 0.0, z - of_star)  # of -inf too
    logps = (result.logps[:, None] + below).masked_fill_(labels.ignored, 0.0).masked_fill_(labels.invalid, torch.nan)
    is_top1 = None if result.is_top1 is None else result.is_top1[:, None] & is_star & valid
    return replace(result, logps=logps, is_top1=is_top1, selected=z)


def _rows_at_once(z: Tensor) -> int:
    """That ranks exchange, each its own [n, K]: as many on every one."""
    return max(1, SUMS_BYTES // (8 * z.element_size() * z.shape[1]))


def backward(
    engine: Engine,
    head: Head,
    rows: Rows,
    saved: Forward,
    upstream: Upstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    """As the engine's. Of a weight in a half type, rows that are labels are rounded twice: what the engine wrote, and
    that with the entries' part, which is summed in fp32."""
    labels, z = _Labels.of(rows), saved.selected
    star = labels.star(z)
    of_star = labels.valid & (labels.ids == star[:, None])
    first = of_star.int().argmax(1, keepdim=True)
    of_others = upstream.coef.masked_fill(of_star | ~labels.valid, 0.0)
    coef_lse = -of_others.sum(1) if upstream.coef_lse is None else upstream.coef_lse - of_others.sum(1)
    coef = upstream.coef.masked_fill(~of_star, 0.0).sum(1)
    columns = labels.columns(rows, head).masked_fill_(of_others == 0, -1)
    problem = _Problem(
        head,
        rows.replace(labels=star),
        replace(saved, logps=saved.logps.gather(1, first)[:, 0], selected=None, is_top1=None),
        Upstream(coef, upstream.coef_entropy, coef_lse),
        columns,
        _through_transform(of_others, z, head),
        labels.invalid.any(1),
    )
    grads = Gradients() if sums is None else replace(sums)
    places = {"bias": head.bias, "lora_a": head.lora and head.lora.a, "lora_b": head.lora and head.lora.b}
    for name, like in places.items():
        if getattr(needs, name) and getattr(grads, name) is None:
            setattr(grads, name, Gradients.place(like.shape, like))
    size = _range_size(head, rows, needs, grads)
    if size is None:
        grads = problem.backward(engine, routing, needs, grads)
    else:
        dhidden = head.hidden.new_empty(len(star), head.hidden.shape[-1])
        of_range = Needs(hidden=True, lora_a=needs.lora_a)
        for start in range(0, len(star), size):
            part = problem if size >= len(star) else problem.rows_from(start, start + size)
            grads.hidden = Gradients.place(dhidden[start : start + size].shape, dhidden)
            asked = needs if part is problem else of_range
            grads = part.backward(engine, routing, asked, grads)
            dhidden[start : start + size] = grads.hidden
        grads.hidden = None
        of_head = needs._replace(hidden=False, lora_a=False)
        if size < len(star) and True in of_head:
            grads = problem.backward(engine, routing, of_head, grads)
        grads.hidden = dhidden
    for name, like in places.items():
        if getattr(needs, name) and (sums is None or getattr(sums, name) is None):
            setattr(grads, name, getattr(grads, name).to(like.dtype))
    return grads


def _range_size(head: Head, rows: Rows, needs: Needs, sums: Gradients) -> int | None:
    """Rows whose dhidden is summed at once and then rounded; None: it is neither, or not wanted."""
    dtype = head.hidden.dtype
    if (
        not needs.hidden
        or sums.hidden is not None
        or dtype in (torch.float32, torch.float64)
        or rows.labels.numel() == 0
    ):
        return None
    return max(1, SUMS_BYTES // (4 * head.hidden.shape[-1]))


def _through_transform(coef: Tensor, z: Tensor, head: Head) -> Tensor:
    scale, softcap, temperature = head.transform
    dz = coef * (scale / temperature)
    return dz * (1 - (z * (temperature / softcap)) ** 2) if softcap else dz


class _Problem(NamedTuple):
    head: Head
    rows: Rows
    saved: Forward
    upstream: Upstream
    columns: Tensor  # [M, K] of the entries, -1 for none
    dz: Tensor  # [M, K]
    invalid: Tensor  # [M]

    def rows_from(self, start: int, stop: int) -> _Problem:
        part = slice(start, stop)

        def rows_of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[part]

        fields = ("logps", "lse", "entropy", "bitmap", "most_pairs")
        saved = Forward(**{name: rows_of(getattr(self.saved, name)) for name in fields})
        upstream = Upstream(*(rows_of(x) for x in vars(self.upstream).values()))
        head = self.head.replace(hidden=_flat(self.head.hidden, start, stop))
        rows = self.rows.replace(labels=self.rows.labels[part])
        return _Problem(head, rows, saved, upstream, self.columns[part], self.dz[part], self.invalid[part])

    def backward(self, engine: Engine, routing: Routing | None, needs: Needs, sums: Gradients) -> Gradients:
        """`sums`, with the gradients that are needed added, or as they are where they had no place."""
        places = Gradients(*[x if need else None for x, need in zip(vars(sums).values(), needs)])
        grads = engine.backward(self.head, self.rows, self.saved, self.upstream, routing, needs, places)
        grads = Gradients(*[x if need else None for x, need in zip(vars(grads).values(), needs)])
        entries_of(engine).backward(self.head, self.columns, self.dz, grads)
        if grads.hidden is not None:
            grads.hidden.masked_fill_(self.invalid[:, None], torch.nan)
        return replace(sums, **{name: x for name, x in vars(grads).items() if x is not None})


def _flat(hidden: Tensor, start: int, stop: int) -> Tensor:
    """Rows of [..., H], of which there may be no flat view."""
    if hidden.ndim == 2:
        return hidden[start:stop]
    if hidden.is_contiguous():
        return hidden.view(-1, hidden.shape[-1])[start:stop]
    shape = hidden.shape[:-1]
    return hidden[torch.unravel_index(torch.arange(start, min(stop, prod(shape)), device=hidden.device), shape)]
