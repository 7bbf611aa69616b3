"""Single logits, of entries: a row and one column of the head each. In plain torch, for the CPU and as the oracle.

    z[n, k] = transform(hidden[n] . weight[columns[n, k]] + bias + low rank)          columns -1: no entry, and not read
    dhidden[n] += sum_k dz[n, k] weight[columns[n, k]]          dweight[c] += sum of dz[n, k] hidden[n] over its entries

dz is of the product, the transform's slope in it. Entries are taken in order, those of the head by column, a bounded
number at a time; sums are fp32 (fp64), in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .by_token import as_rows
from .problem import Gradients, Head

ROWS_BYTES = 8 << 20  # of gathered rows of either operand


class _Operands:
    """Rows of both operands, rounded as the products' are."""

    def __init__(self, head: Head):
        self.head = head
        self.hidden, self.source = as_rows(head.hidden)
        self.dtype = torch.promote_types(head.compute_dtype, torch.float32)
        self.size = max(1, ROWS_BYTES // (head.hidden.shape[-1] * self.dtype.itemsize))  # entries at a time

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.head.compute_dtype).to(self.dtype)

    def hidden_of(self, rows: Tensor) -> Tensor:
        return self.rounded(self.hidden[rows if self.source is None else self.source[rows]])

    def low_rank(self, rows: Tensor) -> Tensor:
        """[rows, r]: the low-rank head's first product, scaled."""
        a = self.rounded(self.head.lora.a)
        parts = [self.hidden_of(part) @ a.T for part in rows.split(self.size)]
        return self.head.lora.scale * torch.cat(parts) if parts else a.new_empty(0, a.shape[0])


def logits(head: Head, columns: Tensor) -> Tensor:
    """[M, K] fp32 (fp64) of [M, K] int64 columns; -inf where there is no entry."""
    of = _Operands(head)
    rows, places = (columns >= 0).nonzero().unbind(1)
    at = columns[rows, places]
    z = torch.full(columns.shape, -torch.inf, dtype=of.dtype, device=columns.device)
    if head.lora is not None:
        unique, of_unique = rows.unique_consecutive(return_inverse=True)
        low_rank = of.low_rank(unique)
    products = []
    for part in torch.arange(len(rows), device=rows.device).split(of.size):
        product = (of.hidden_of(rows[part]) * of.rounded(head.weight[at[part]])).sum(1)
        if head.lora is not None:
            product += (low_rank[of_unique[part]] * of.rounded(head.lora.b[at[part]])).sum(1)
        products.append(product)
    if products:
        product = torch.cat(products)
        product = product if head.bias is None else product + head.bias[at].to(of.dtype)
        z[rows, places] = head.transform.applied(product)
    return z


def backward(head: Head, columns: Tensor, dz: Tensor, grads: Gradients) -> None:
    """Adds to the gradients that are there: dhidden [M, H] and the low-rank factors' and the bias's in a wide type, the
    weight's in any, each of its rows rounded once."""
    of = _Operands(head)
    rows, places = (columns >= 0).nonzero().unbind(1)
    if len(rows) == 0:
        return
    at, dz = columns[rows, places], dz[rows, places].to(of.dtype)
    if grads.hidden is not None:
        for r, c, d in zip(*(x.split(of.size) for x in (rows, at, dz))):
            grads.hidden.index_add_(0, r, (d[:, None] * of.rounded(head.weight[c])).to(grads.hidden.dtype))
    if head.lora is not None and (grads.hidden is not None or grads.lora_a is not None):
        _through_lora_a(of, rows, at, dz, grads)
    order = at.argsort(stable=True)
    rows, at, dz = rows[order], at[order], dz[order]
    if grads.bias is not None:
        grads.bias.index_add_(0, at, dz.to(grads.bias.dtype))
    if grads.weight is not None:
        _add_by_column(grads.weight, at, lambda part: dz[part, None] * of.hidden_of(rows[part]), of)
    if grads.lora_b is not None:
        unique, of_unique = rows.unique(return_inverse=True)
        low_rank = of.low_rank(unique)
        _add_by_column(grads.lora_b, at, lambda part: dz[part, None] * low_rank[of_unique[part]], of)


def _through_lora_a(of: _Operands, rows: Tensor, at: Tensor, dz: Tensor, grads: Gradients) -> None:
    a, b, scale = of.head.lora
    unique, of_unique = rows.unique_consecutive(return_inverse=True)
    dlow_rank = torch.zeros(len(unique), a.shape[0], dtype=of.dtype, device=dz.device)
    for u, c, d in zip(*(x.split(of.size) for x in (of_unique, at, dz))):
        dlow_rank.index_add_(0, u, scale * d[:, None] * of.rounded(b[c]))
    a = of.rounded(a)
    for part, d in zip(unique.split(of.size), dlow_rank.split(of.size)):
        if grads.hidden is not None:
            grads.hidden.index_add_(0, part, (d @ a).to(grads.hidden.dtype))
        if grads.lora_a is not None:
            grads.lora_a += (d.T @ of.hidden_of(part)).to(grads.lora_a.dtype)


def _add_by_column(out: Tensor, at: Tensor, values, of: _Operands) -> None:
    """out[at] += values(of entries), of ascending `at`: each row of `out` is read and written once."""
    ids, counts = at.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    for first in range(0, len(ids), of.size):
        last = min(first + of.size, len(ids))
        begin, end = int(ends[first] - counts[first]), int(ends[last - 1])
        sums = torch.zeros(last - first, out.shape[1], dtype=of.dtype, device=out.device)
        of_entry = torch.repeat_interleave(torch.arange(last - first, device=at.device), counts[first:last])
        for start in range(begin, end, of.size):
            stop = min(start + of.size, end)
            part = torch.arange(start, stop, device=at.device)
            sums.index_add_(0, of_entry[start - begin : stop - begin], values(part))
        chosen = ids[first:last]
        out[chosen] = (out[chosen].to(of.dtype) + sums).to(out.dtype)
