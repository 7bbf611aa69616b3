"""The gradient of a low-rank head's lora_a, from the sums of dz @ lora_b."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import VARYING, dot, hidden_offset, load_rows, num_tokens, rounded
from .launch import launch
from .sweep import Sweep


@triton.jit(do_not_specialize=VARYING)
def lora_a_kernel(
    hidden,
    sums,  # [capacity, pitch] fp32: dz @ lora_b
    low_rank,  # LowRank
    tokens,
    unscale,
    partial,  # [lora_rank, H] fp32: of earlier ranges
    out,  # [lora_rank, H]
    first_token,
    capacity,
    is_first,  # of all ranges
    is_last,
    H,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program writes a tile [BM, BN] of scale * sums.T @ hidden, or adds it to `partial`."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    n = num_tokens(tokens, first_token, capacity)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, n, BK):
        i = k + tl.arange(0, BK)
        exists = i < n
        offsets = hidden_offset(tokens, first_token + i, exists)
        at = i.to(tl.int64)[:, None] * low_rank.pitch + r[None, :]
        a = tl.load(sums + at, mask=exists[:, None] & (r < low_rank.lora_rank)[None, :], other=0.0)
        b = load_rows(hidden, offsets, exists, tl.program_id(1) * BN, H, BN)
        acc = dot(a.T, b, acc, tl.float32)
    acc *= low_rank.scale
    where = r[:, None] * H + c[None, :]
    inside = (r < low_rank.lora_rank)[:, None] & (c < H)[None, :]
    if is_first == 0:
        acc += tl.load(partial + where, mask=inside, other=0.0)
    if is_last == 1:
        if unscale is not None:
            acc *= tl.load(unscale)
        tl.store(out + where, rounded(acc, out.dtype.element_ty), mask=inside)
    else:
        tl.store(partial + where, acc, mask=inside)


def lora_a(sweep: Sweep, out: Tensor) -> None:
    """A sweep's part of the gradient of lora_a, which the last one writes."""
    call, tokens = sweep.call, sweep.tokens
    tile = call.tile("lora_a", kind="low_rank")
    launch(
        lora_a_kernel,
        (triton.cdiv(call.lora_rank, tile.m), triton.cdiv(call.hidden_size, tile.n)),
        tile,
        hidden=call.hidden,
        sums=sweep.dlow_rank,
        low_rank=sweep.low_rank,
        unscale=sweep.unscale,
        partial=sweep.lora_a_sums,
        out=out,
        H=call.hidden_size,
        is_first=int(tokens.first_token == 0),
        is_last=int(tokens.first_token + tokens.capacity >= call.num_rows),
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        **tokens._asdict(),
    )
