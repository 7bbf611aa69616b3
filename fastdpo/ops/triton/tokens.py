"""The completion tokens: which rows they are, and their hidden states side by side.

compact    labels -> the tokens' rows, counted on the device, and the first tokens' hidden states; what other rows get
gather     hidden rows of a range of tokens -> contiguous, in the type to multiply in
low_rank   hidden @ lora_a.T of a low-rank head
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRET,
    VARYING,
    LowRank,
    TokenList,
    TokenRange,
    dot,
    hidden_offset,
    load_rows,
    num_tokens,
    rounded,
)
from .launch import launch
from .stats import Results, store_nothing

SCAN = tl.constexpr(2048)  # rows that a program counts at a time
ROWS = tl.constexpr(64 if INTERPRET.value else 16)  # that a program copies at a time,
COLUMNS = tl.constexpr(256)  # and columns of them
PROGRAMS = 4  # of `compact` on one multiprocessor


class Pairs(NamedTuple):
    """What of the kept pairs is zero in rows without a token, so that the same call gives the same bits."""

    bitmap: Tensor | None = None  # [M, bytes] uint8
    most_pairs: Tensor | None = None  # [M] int32


@triton.jit
def _is_scored(labels, coef, coef_entropy, r, num_rows, ignore_index, vocab_size):
    """(scored, label, label is out of range) of rows `r`; with `coef`, only rows that have an upstream gradient."""
    label = tl.load(labels + r, mask=r < num_rows, other=0).to(tl.int64)
    bad = (label != ignore_index) & ((label < 0) | (label >= vocab_size))
    scored = (r < num_rows) & (label != ignore_index) & ~bad
    if coef is not None:
        active = tl.load(coef + r, mask=r < num_rows, other=0.0) != 0
        if coef_entropy is not None:
            active = active | (tl.load(coef_entropy + r, mask=r < num_rows, other=0.0) != 0)
        scored = scored & active
    return scored, label, bad & (r < num_rows)


@triton.jit
def _copy_row(hidden, offsets, exists, out, i, H, pitch):
    """hidden at element `offsets` -> rows `i` of `out` [*, pitch], where they exist; columns from H on are 0."""
    for k0 in range(0, pitch, COLUMNS):
        k = k0 + tl.arange(0, COLUMNS)
        x = load_rows(hidden, offsets, exists, k0, H, COLUMNS)
        target = out + i.to(tl.int64)[:, None] * pitch + k[None, :]
        tl.store(target, rounded(x, out.dtype.element_ty), mask=exists[:, None] & (k < pitch)[None, :])


@triton.jit(do_not_specialize=VARYING)
def compact_kernel(
    labels,  # [M] int32 or int64
    coef,  # [M] fp32 or None, as the next
    coef_entropy,
    tokens,
    results,  # Results or those of a divergence: rows that are no token are filled,
    pairs,  # and so are Pairs
    hidden,
    out,  # [capacity, pitch]: hidden of the first tokens; or None
    cleared,  # [steps] int32 or None, set to zero
    steps,
    num_rows,
    share,  # rows of one program
    ignore_index,
    vocab_start,
    vocab_size,
    inner,  # hidden is [outer, inner, H] with the caller's strides, these in units of tokens.unit
    outer_stride,
    inner_stride,
    capacity,
    H,
    pitch,
    set_bytes,  # of a row of the bitmap
    RESULTS: tl.constexpr,  # how many fields they have: len() of a tuple with None in it does not compile
):
    """A program has `share` rows and writes the tokens among them; it counts the rows before its own, so that no second
    launch and no wait is needed. The last one writes the count."""
    if cleared is not None:
        if tl.program_id(0) == 0:
            for start in range(0, steps, SCAN):
                at = start + tl.arange(0, SCAN)
                tl.store(cleared + at, tl.zeros((SCAN,), tl.int32), mask=at < steps)
    first = tl.program_id(0) * share
    token = 0
    for start in range(0, first, SCAN):
        r = start + tl.arange(0, SCAN)
        scored, _, _ = _is_scored(labels, coef, coef_entropy, r, tl.minimum(first, num_rows), ignore_index, vocab_size)
        token += tl.sum(scored.to(tl.int32), 0)
    last = tl.minimum(first + share, num_rows)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        scored, label, bad = _is_scored(labels, coef, coef_entropy, r, last, ignore_index, vocab_size)
        flags = scored.to(tl.int32)
        i = token + tl.cumsum(flags, 0) - flags
        token += tl.sum(flags, 0)
        row = r.to(tl.int64)
        offsets = (row // inner) * outer_stride + (row % inner) * inner_stride
        tl.store(tokens.rows + i, r, mask=scored)
        tl.store(tokens.labels + i, (label - vocab_start).to(tl.int32), mask=scored)
        tl.store(tokens.offsets + i, offsets, mask=scored)
        tl.store(tokens.token_of_row + r, tl.where(scored, i, tl.where(bad, -2, -1)), mask=r < last)
        skipped = (r < last) & ~scored
        if results.lse is not None:
            store_nothing(results, RESULTS, r, bad, skipped)
        if pairs.bitmap is not None:
            tl.store(pairs.most_pairs + r, 0, mask=skipped)
            for start_byte in range(0, set_bytes, COLUMNS):
                byte = start_byte + tl.arange(0, COLUMNS)
                target = pairs.bitmap + row[:, None] * set_bytes + byte[None, :]
                tl.store(
                    target, tl.zeros((ROWS, COLUMNS), tl.uint8), mask=skipped[:, None] & (byte < set_bytes)[None, :]
                )
        if out is not None:
            _copy_row(hidden, offsets * tokens.unit, scored & (i < capacity), out, i, H, pitch)
    tl.store(tokens.count, token, mask=(last == num_rows) & (first < num_rows))


def compact(
    call,
    results: Results | None = None,
    pairs: Pairs | None = None,
    first: Tensor | None = None,
    coef=None,
    coef_entropy=None,
    cleared: Tensor | None = None,
) -> TokenList:
    """The tokens of the call, or of the rows with an upstream gradient; other rows of `results` and `pairs` are filled,
    `first` [capacity, pitch] gets the hidden states of the first tokens, and `cleared` is set to zero."""
    m, rows = call.num_rows, call.rows
    make = partial(torch.empty, dtype=torch.int32, device=call.device)
    tokens = TokenList(*map(make, (m, m, m, 1)), make(m, dtype=torch.int64), call.unit)
    share = max(ROWS.value, triton.cdiv(m, PROGRAMS * call.target.programs))
    outer_stride, inner_stride, _ = (stride // call.unit.value for stride in call.hidden.stride())
    launch(
        compact_kernel,
        (triton.cdiv(m, share),),
        labels=rows.labels,
        coef=coef,
        coef_entropy=coef_entropy,
        tokens=tokens,
        results=results or Results(),
        pairs=pairs or Pairs(),
        hidden=call.hidden,
        out=first,
        cleared=cleared,
        steps=0 if cleared is None else cleared.numel(),
        num_rows=m,
        share=share,
        ignore_index=rows.ignore_index,
        vocab_start=rows.vocab_start,
        vocab_size=rows.vocab_size,
        inner=call.hidden.shape[1],
        outer_stride=outer_stride,
        inner_stride=inner_stride,
        capacity=0 if first is None else len(first),
        H=call.hidden_size,
        pitch=call.pitch,
        set_bytes=0 if pairs is None or pairs.bitmap is None else pairs.bitmap.shape[1],
        RESULTS=len(results or Results()),
    )
    return tokens


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(hidden, tokens, out, first_token, capacity, H, pitch):
    """A program writes ROWS rows of `out` [capacity, pitch], in the type to multiply in, where tokens exist."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = i < num_tokens(tokens, first_token, capacity)
    offsets = hidden_offset(tokens, first_token + i, exists)
    _copy_row(hidden, offsets, exists, out, i, H, pitch)


def gather(call, tokens: TokenRange, out: Tensor) -> None:
    """`out` [capacity, pitch] = hidden of these tokens, in the type to multiply in."""
    launch(
        gather_kernel,
        (triton.cdiv(tokens.capacity, ROWS.value),),
        **tokens._asdict(),
        hidden=call.hidden,
        out=out,
        H=call.hidden_size,
        pitch=call.pitch,
    )


@triton.jit(do_not_specialize=VARYING)
def low_rank_kernel(
    hidden,
    low_rank,  # LowRank, whose product is written
    tokens,
    first_token,
    capacity,
    H,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """A program writes the rows of BM tokens; rows without a token are 0."""
    R: tl.constexpr = low_rank.pitch
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.arange(0, R)
    exists = i < num_tokens(tokens, first_token, capacity)
    offsets = hidden_offset(tokens, first_token + i, exists)
    acc = tl.zeros((BM, R), tl.float32)
    for k0 in range(0, H, BK):
        k = k0 + tl.arange(0, BK)
        x = load_rows(hidden, offsets, exists, k0, H, BK)
        inside = (r < low_rank.lora_rank)[:, None] & (k < H)[None, :]
        a = tl.load(low_rank.lora_a + r[:, None] * H + k[None, :], mask=inside, other=0.0)
        acc = dot(x, a.T, acc, COMPUTE)
    target = low_rank.product + i.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(target, acc * low_rank.scale, mask=(i < capacity)[:, None])


def low_rank(call, tokens: TokenRange) -> LowRank:
    """lora_scale * hidden @ lora_a.T of these tokens, with what it is multiplied by."""
    if call.lora_a is None:
        return LowRank()
    pitch, tile = call.low_rank_pitch, call.tile("low_rank")
    product = torch.empty(tokens.capacity, pitch, dtype=torch.float32, device=call.device)
    part = LowRank(product, call.lora_a, call.lora_b, call.head.lora.scale, call.lora_rank, tl.constexpr(pitch))
    launch(
        low_rank_kernel,
        (triton.cdiv(tokens.capacity, tile.m),),
        tile,
        hidden=call.hidden,
        low_rank=part,
        H=call.hidden_size,
        COMPUTE=call.compute,
        BM=tile.m,
        BK=tile.k,
        **tokens._asdict(),
    )
    return part
