"""The completion tokens: which rows they are, their hidden states side by side, and back to rows.

compact    labels -> the tokens' rows, counted on the device; what ignored and bad rows get
gather     hidden rows of a range of tokens -> contiguous, in the type to multiply in
low_rank   hidden @ lora_a.T of a low-rank head
spread     dhidden of tokens -> rows
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import VARYING, LowRank, TokenList, TokenRange, dot, num_tokens, rounded, row_offset
from .launch import launch
from .stats import Results, store_nothing

COMPACT = tl.constexpr(2048)  # rows of one program
ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(256)  # of one program that copies


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


@triton.jit(do_not_specialize=VARYING)
def compact_kernel(labels, coef, coef_entropy, tokens, results, num_rows, ignore_index, vocab_start, vocab_size):
    """A program has COMPACT rows and writes the tokens among them; it counts the rows before its own, so that no
    second launch and no wait is needed. The last one writes the count.

    labels [M] int32 or int64; coef and coef_entropy [M] fp32 or None; rows of Results that are no token are filled.
    """
    first = tl.program_id(0) * COMPACT
    before = 0
    for start in range(0, first, COMPACT):
        r = start + tl.arange(0, COMPACT)
        scored, _, _ = _is_scored(labels, coef, coef_entropy, r, num_rows, ignore_index, vocab_size)
        before += tl.sum(scored.to(tl.int32), 0)
    r = first + tl.arange(0, COMPACT)
    scored, label, bad = _is_scored(labels, coef, coef_entropy, r, num_rows, ignore_index, vocab_size)
    flags = scored.to(tl.int32)
    token = before + tl.cumsum(flags, 0) - flags
    tl.store(tokens.rows + token, r, mask=scored)
    tl.store(tokens.labels + token, (label - vocab_start).to(tl.int32), mask=scored)
    tl.store(tokens.token_of_row + r, tl.where(scored, token, tl.where(bad, -2, -1)), mask=r < num_rows)
    tl.store(tokens.count, before + tl.sum(flags, 0), mask=first + COMPACT >= num_rows)
    if results.logps is not None:
        store_nothing(results, r, bad, (r < num_rows) & ~scored)


def compact(call, results: Results | None = None, coef: Tensor | None = None, coef_entropy=None) -> TokenList:
    """The tokens of the call, or of the rows with an upstream gradient; other rows of `results` are filled."""
    m, rows = call.num_rows, call.rows
    tokens = TokenList(*map(partial(torch.empty, dtype=torch.int32, device=call.device), (m, m, m, 1)))
    launch(
        compact_kernel,
        (triton.cdiv(m, COMPACT.value),),
        warps=8,
        labels=rows.labels,
        coef=coef,
        coef_entropy=coef_entropy,
        tokens=tokens,
        results=results or Results(),
        num_rows=m,
        ignore_index=rows.ignore_index,
        vocab_start=rows.vocab_start,
        vocab_size=rows.vocab_size,
    )
    return tokens


def _copies(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, ROWS.value), triton.cdiv(columns, COLUMNS.value)


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(hidden, tokens, out, flag, first_token, capacity, H, pitch):
    """A program writes a tile of `out` [capacity, pitch], in the type to multiply in: HiddenRows of the tokens; rows
    without a token and columns from H on are 0."""
    if flag is not None:
        if tl.load(flag) != 0:
            return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = i < num_tokens(tokens, first_token, capacity)
    row = tl.load(tokens.rows + first_token + i, mask=exists, other=0)
    source = hidden.source + row_offset(hidden, row)[:, None] + k[None, :]
    x = tl.load(source, mask=exists[:, None] & (k < H)[None, :], other=0.0)
    target = out + i.to(tl.int64)[:, None] * pitch + k[None, :]
    tl.store(target, rounded(x, out.dtype.element_ty), mask=(i < capacity)[:, None] & (k < pitch)[None, :])


def gather(call, tokens: TokenRange, flag: Tensor | None = None) -> Tensor:
    """[capacity, pitch]: hidden of these tokens, contiguous, in the type to multiply in; zeros where none is."""
    out = torch.empty(tokens.capacity, call.pitch, dtype=call.dtype, device=call.device)
    launch(
        gather_kernel,
        _copies(tokens.capacity, call.pitch),
        **tokens._asdict(),
        hidden=call.hidden,
        out=out,
        flag=flag,
        H=call.hidden_size,
        pitch=call.pitch,
    )
    return out


@triton.jit(do_not_specialize=VARYING)
def low_rank_kernel(
    hidden,  # [capacity, pitch] gathered
    lora_a,  # [lora_rank, H]
    out,  # [capacity, R] fp32 = lora_scale * hidden @ lora_a.T
    capacity,
    pitch,
    H,
    lora_rank,
    lora_scale,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    R: tl.constexpr,
):
    """A program writes the rows of BM tokens."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    for k0 in range(0, H, BK):
        k = k0 + tl.arange(0, BK)
        inside = (i < capacity)[:, None] & (k < H)[None, :]
        x = tl.load(hidden + i.to(tl.int64)[:, None] * pitch + k[None, :], mask=inside, other=0.0)
        a = tl.load(lora_a + r[:, None] * H + k[None, :], mask=(r < lora_rank)[:, None] & (k < H)[None, :], other=0.0)
        acc = dot(x, a.T, acc, COMPUTE)
    tl.store(out + i.to(tl.int64)[:, None] * R + r[None, :], acc * lora_scale, mask=(i < capacity)[:, None])


def low_rank(call, gathered: Tensor) -> LowRank:
    """lora_scale * hidden @ lora_a.T of gathered rows, with what it is multiplied by."""
    if call.lora_a is None:
        return LowRank()
    pitch, tile = call.low_rank_pitch, call.tile("low_rank")
    out = torch.empty(len(gathered), pitch, dtype=torch.float32, device=call.device)
    launch(
        low_rank_kernel,
        (triton.cdiv(len(gathered), tile.m),),
        tile,
        hidden=gathered,
        lora_a=call.lora_a,
        out=out,
        capacity=len(gathered),
        pitch=call.pitch,
        H=call.hidden_size,
        lora_rank=call.lora_rank,
        lora_scale=call.head.lora.scale,
        COMPUTE=call.compute,
        BM=tile.m,
        BK=tile.k,
        R=pitch,
    )
    return LowRank(out, call.lora_b, call.lora_rank, tl.constexpr(pitch))


@triton.jit(do_not_specialize=VARYING)
def spread_kernel(sums, tokens, unscale, out, num_rows, first_token, capacity, H):
    """A program has a tile of `out` [M, H] and writes the rows of these tokens from their fp32 sums [capacity, H]; with
    the first tokens also the rows that are none: 0, or NaN."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens.token_of_row + r, mask=r < num_rows, other=-3)
    here = (token >= first_token) & (token < first_token + capacity)
    at = (token - first_token).to(tl.int64)[:, None] * H + k[None, :]
    x = tl.load(sums + at, mask=here[:, None] & (k < H)[None, :], other=0.0)
    if unscale is not None:
        x *= tl.load(unscale)
    x = tl.where((token == -2)[:, None], float("nan"), x)
    write = here | ((token < 0) & (token > -3) & (token * 0 + first_token == 0))
    target = out + r.to(tl.int64)[:, None] * H + k[None, :]
    tl.store(target, rounded(x, out.dtype.element_ty), mask=write[:, None] & (k < H)[None, :])


def spread(call, tokens: TokenRange, sums: Tensor, unscale: Tensor | None, out: Tensor) -> None:
    """fp32 sums of tokens -> their rows of dhidden."""
    launch(
        spread_kernel,
        _copies(call.num_rows, call.hidden_size),
        **tokens._asdict(),
        sums=sums,
        unscale=unscale,
        out=out,
        num_rows=call.num_rows,
        H=call.hidden_size,
    )
