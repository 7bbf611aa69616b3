"""The Triton engine's logits of single entries, a row and one column of the head each, and their gradients: as
ops/entries.py defines them. Nothing waits for the device, and every sum has one program and one order.

    logits and dhidden     a program a row, from the rows of weight that its entries name
    dweight                entries sorted by column; a program a column, which most find without an entry
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Gradients, Head, Rows
from .call import Call
from .common import VARYING, logit, rounded
from .launch import launch, on_device

ENTRIES = tl.constexpr(16)  # of a row or a column at a time,
DEPTH = tl.constexpr(128)  # and columns of hidden and weight: 16 KiB of registers for their products
SOME_ROWS = 4096  # of a low-rank head's products in fp64 at a time


@triton.jit
def _hidden_offset(row, inner, outer_stride, inner_stride, unit: tl.constexpr):
    return ((row // inner) * outer_stride + (row % inner) * inner_stride) * unit


@triton.jit(do_not_specialize=VARYING)
def entry_logits_kernel(
    hidden,  # [outer, inner, H], strides in units of UNIT elements
    head,  # Columns
    weight,
    low_rank,  # [M, R] fp32: scale * hidden @ lora_a.T; or None, as the next
    lora_b,  # [V, R]
    columns,  # [M, K] int64, -1: none
    out,  # [M, K] fp32
    transform,
    inner,
    outer_stride,
    inner_stride,
    K,
    R,
    COMPUTE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A program writes ENTRIES logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    column = tl.load(columns + row * K + k, mask=k < K, other=-1)
    exists = column >= 0
    source = hidden + _hidden_offset(row, inner, outer_stride, inner_stride, UNIT)
    any_entry = tl.max(column, 0) >= 0
    acc = tl.zeros((ENTRIES, DEPTH), tl.float32)
    for start in range(0, tl.where(any_entry, head.H, 0), DEPTH):
        d = start + tl.arange(0, DEPTH)
        h = rounded(tl.load(source + d, mask=d < head.H, other=0.0), COMPUTE).to(tl.float32)
        inside = exists[:, None] & (d < head.H)[None, :]
        w = tl.load(weight + column[:, None] * head.weight_stride + d[None, :], mask=inside, other=0.0)
        acc += rounded(w, COMPUTE).to(tl.float32) * h[None, :]
    product = tl.sum(acc, 1)
    if low_rank is not None:
        for r in range(0, tl.where(any_entry, R, 0)):
            b = tl.load(lora_b + column * R + r, mask=exists, other=0.0)
            product += rounded(b, COMPUTE).to(tl.float32) * tl.load(low_rank + row * R + r)
    if head.bias is not None:
        product += tl.load(head.bias + column, mask=exists, other=0.0).to(tl.float32)
    z = tl.where(exists, logit(product, transform), float("-inf"))
    tl.store(out + row * K + k, z, mask=k < K)


@triton.jit(do_not_specialize=VARYING)
def entry_rows_kernel(operand, stride, columns, dz, out, K, D, COMPUTE: tl.constexpr):
    """out[row] += sum_k dz[row, k] operand[columns[row, k]], DEPTH of D columns a program; rows of `out` are D long."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    acc = tl.zeros((ENTRIES, DEPTH), tl.float32)
    last = -1
    for start in range(0, K, ENTRIES):
        k = start + tl.arange(0, ENTRIES)
        column = tl.load(columns + row * K + k, mask=k < K, other=-1)
        exists = column >= 0
        of_entry = tl.load(dz + row * K + k, mask=exists, other=0.0)
        inside = exists[:, None] & (d < D)[None, :]
        x = tl.load(operand + column[:, None] * stride + d[None, :], mask=inside, other=0.0)
        acc += rounded(x, COMPUTE).to(tl.float32) * of_entry[:, None]
        last = tl.maximum(last, tl.max(column, 0).to(tl.int32))
    if last >= 0:
        target = out + row * D + d
        tl.store(target, tl.load(target, mask=d < D, other=0.0) + tl.sum(acc, 0), mask=d < D)


@triton.jit(do_not_specialize=VARYING)
def entry_columns_kernel(
    source,  # rows at the offsets of `_hidden_offset`
    entries,  # [M * K] int64 places in `dz`, by column
    starts,  # [V + 1] int64, where a column's begin
    dz,  # [M, K] fp32
    out,  # rows D long, of any type
    inner,
    outer_stride,
    inner_stride,
    K,
    D,
    COMPUTE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """out[column] += sum of dz * source's row over the column's entries, in order; a program's own."""
    column = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + column), tl.load(starts + column + 1)
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    if last > first:
        acc = tl.zeros((ENTRIES, DEPTH), tl.float32)
        for start in range(first, last, ENTRIES):
            at = start + tl.arange(0, ENTRIES)
            exists = at < last
            entry = tl.load(entries + at, mask=exists, other=0)
            of_entry = tl.load(dz + entry, mask=exists, other=0.0)
            offset = _hidden_offset(entry // K, inner, outer_stride, inner_stride, UNIT)
            x = tl.load(source + offset[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
            acc += rounded(x, COMPUTE).to(tl.float32) * of_entry[:, None]
        target = out + column * D + d
        total = tl.load(target, mask=d < D, other=0.0).to(tl.float32) + tl.sum(acc, 0)
        tl.store(target, rounded(total, out.dtype.element_ty), mask=d < D)


class _Entries:
    def __init__(self, head: Head, columns: Tensor):
        # the labels only give the number of rows
        self.call = Call(head, Rows(columns[:, 0], -1, 0, head.weight.shape[0]))
        self.columns, self.shape, self.unit = columns, columns.shape, self.call.unit.value

    def strides(self) -> dict[str, int]:
        """Of hidden's rows, as kernels take them."""
        outer, inner, _ = (stride // self.unit for stride in self.call.hidden.stride())
        return {"inner": self.call.hidden.shape[1], "outer_stride": outer, "inner_stride": inner}

    def low_rank(self) -> Tensor | None:
        """[M, r] fp32: scale * hidden @ lora_a.T; of rows without an entry 0."""
        call = self.call
        if call.lora_a is None:
            return None
        a = self.wide(call.lora_a)
        parts = [call.head.lora.scale * (hidden @ a.T) for _, hidden in self.some_hidden()]
        return torch.cat(parts).float()

    def some_hidden(self):
        """(rows, their hidden in fp64, of rows without an entry 0): short products in fp64 hang on no setting of
        torch's matrix products, such as TF32."""
        hidden, some = self.call.hidden, (self.columns >= 0).any(1)
        for start in range(0, self.shape[0], SOME_ROWS):
            rows = slice(start, min(start + SOME_ROWS, self.shape[0]))
            at = torch.arange(rows.start, rows.stop, device=hidden.device)
            x = self.wide(hidden[at // hidden.shape[1], at % hidden.shape[1]])
            yield rows, torch.where(some[rows, None], x, 0.0)

    def wide(self, x: Tensor) -> Tensor:
        return x.to(self.call.dtype).double()


def logits(head: Head, columns: Tensor) -> Tensor:
    """[M, K] fp32 of [M, K] int64 columns; -inf where there is no entry."""
    z = torch.empty(columns.shape, dtype=torch.float32, device=columns.device)
    if z.numel() == 0:
        return z
    with on_device(z.device):
        of = _Entries(head, columns)
        call, (m, k) = of.call, of.shape
        launch(
            entry_logits_kernel,
            (m, triton.cdiv(k, ENTRIES.value)),
            hidden=call.hidden,
            head=call.columns,
            weight=call.weight,
            low_rank=of.low_rank(),
            lora_b=call.lora_b,
            columns=columns,
            out=z,
            transform=call.transform,
            **of.strides(),
            K=k,
            R=call.lora_rank,
            COMPUTE=call.compute,
            UNIT=call.unit,
        )
    return z


def backward(head: Head, columns: Tensor, dz: Tensor, grads: Gradients) -> None:
    """Adds to the gradients that are there: dhidden [M, H] and the low-rank factors' and the bias's in fp32, the
    weight's in any type, each of its rows rounded once."""
    if columns.numel() == 0:
        return
    with on_device(dz.device):
        of = _Entries(head, columns)
        call, (m, k) = of.call, of.shape

        def add_rows(operand: Tensor, out: Tensor) -> None:
            depth = operand.shape[1]
            grid = (m, triton.cdiv(depth, DEPTH.value))
            arguments = {"columns": columns, "dz": dz, "out": out, "K": k, "D": depth, "COMPUTE": call.compute}
            launch(entry_rows_kernel, grid, operand=operand, stride=operand.stride(0), **arguments)

        if grads.hidden is not None:
            add_rows(call.weight, grads.hidden)
        if call.lora_a is not None and (grads.hidden is not None or grads.lora_a is not None):
            dlow_rank = torch.zeros(m, call.lora_rank, dtype=torch.float32, device=dz.device)
            add_rows(call.lora_b, dlow_rank)
            _through_lora_a(of, dlow_rank, grads)
        if all(x is None for x in (grads.weight, grads.bias, grads.lora_b)):
            return
        by_column = torch.where(columns < 0, call.vocab_size, columns).view(-1)
        by_column, entries = by_column.sort(stable=True)
        starts = torch.searchsorted(by_column, torch.arange(call.vocab_size + 1, device=dz.device))

        def add_columns(source: Tensor, out: Tensor, strides: dict, compute, unit) -> None:
            depth = out.shape[1]
            grid = (call.vocab_size, triton.cdiv(depth, DEPTH.value))
            arguments = {"entries": entries, "starts": starts, "dz": dz, "out": out, "K": k, "D": depth}
            launch(entry_columns_kernel, grid, source=source, **arguments, **strides, COMPUTE=compute, UNIT=unit)

        if grads.weight is not None:
            add_columns(call.hidden, grads.weight, of.strides(), call.compute, call.unit)
        plain = {"inner": m, "outer_stride": 0}
        if grads.lora_b is not None:
            add_columns(
                of.low_rank(), grads.lora_b, {**plain, "inner_stride": call.lora_rank}, tl.float32, tl.constexpr(1)
            )
        if grads.bias is not None:
            ones = torch.ones(1, 1, dtype=torch.float32, device=dz.device)
            add_columns(ones, grads.bias[:, None], {**plain, "inner_stride": 0}, tl.float32, tl.constexpr(1))


def _through_lora_a(of: _Entries, dlow_rank: Tensor, grads: Gradients) -> None:
    """`dlow_rank` [M, r]: dz @ lora_b."""
    a = of.wide(of.call.lora_a)
    for rows, hidden in of.some_hidden():
        d = of.call.head.lora.scale * dlow_rank[rows].double()
        if grads.hidden is not None:
            grads.hidden[rows] += d @ a
        if grads.lora_a is not None:
            grads.lora_a += d.T @ hidden
