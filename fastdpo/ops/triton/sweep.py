"""One sweep of the backward through the vocabulary: of which tokens, for which gradients, in what memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..problem import Forward, Gradients, Needs, Upstream
from . import memory
from .call import Call
from .common import LowRank, RowTerms, TokenList, TokenRange
from .tokens import gather, low_rank


@dataclass(frozen=True)
class Sweep:
    call: Call
    tokens: TokenRange
    terms: RowTerms
    dz_scale: Tensor | None  # [] fp32: dz is multiplied by it before it is rounded,
    unscale: Tensor | None  # and its products by this
    low_rank: LowRank
    dhidden: Tensor | None  # [capacity, H] fp32 sums
    dlow_rank: Tensor | None  # [capacity, pitch] fp32 sums: dz @ lora_b
    # gradients of the head, where the sweep has all tokens
    dweight: Tensor | None
    dbias: Tensor | None
    dlora_b: Tensor | None
    lora_a_sums: Tensor | None  # [lora_rank, H] fp32, of all sweeps
    slab: tuple[int, int]  # of the exact path: (tokens of a chunk, blocks)
    routed_pairs: int  # of the routed path, in memory at once

    @property
    def by_token(self) -> list[tuple[Tensor, Tensor]]:
        """(sums of dz @ operand, operand)."""
        hidden = [] if self.dhidden is None else [(self.dhidden, self.call.weight)]
        return hidden if self.dlow_rank is None else [*hidden, (self.dlow_rank, self.call.lora_b)]

    @property
    def of_head(self) -> bool:
        return not (self.dweight is None and self.dbias is None and self.dlora_b is None)


def sweeps(
    call: Call, tokens: TokenList, saved: Forward, upstream: Upstream, grads: Gradients, needs: Needs
) -> Iterator[Sweep]:
    """For dhidden as many as its sums need, of a range of tokens each; one more for the head where one was not all."""
    terms = RowTerms(
        saved.logps,
        saved.lse,
        None if upstream.coef_entropy is None else saved.entropy,
        upstream.coef,
        upstream.coef_entropy,
    )
    scales = _scales(upstream, call.dtype)
    lora_a_sums = None
    if needs.lora_a:
        lora_a_sums = torch.empty(call.lora_rank, call.hidden_size, dtype=torch.float32, device=call.device)
    row, item, sums = call.pitch * call.item_size, call.item_size, 4 * (call.hidden_size + call.low_rank_pitch)
    size, fits = memory.range_size(call.num_rows, row, sums)
    joint = needs.of_hidden and needs.of_weight and fits

    def sweep(first: int, capacity: int, slab: tuple[int, int], *, hidden: bool, head: bool) -> Sweep:
        def by_token(columns: int, wanted: bool) -> Tensor | None:
            return torch.zeros(capacity, columns, dtype=torch.float32, device=call.device) if wanted else None

        part = TokenRange(tokens, first, capacity)
        return Sweep(
            call,
            part,
            terms,
            *scales,
            _low_rank(call, part),
            by_token(call.hidden_size, hidden and needs.hidden),
            by_token(call.low_rank_pitch, hidden and call.lora_a is not None),
            *((grads.weight, grads.bias, grads.lora_b) if head else (None, None, None)),
            lora_a_sums,
            slab,
            memory.routed_pairs(capacity * sums * hidden, item),
        )

    if needs.of_hidden:
        slab = memory.hidden_slab(size, row, item, sums, joint=joint)
        for first in range(0, call.num_rows, size):
            yield sweep(first, size, slab, hidden=True, head=joint)
    if needs.of_weight and not joint:
        everything = triton.cdiv(call.num_rows, 128) * 128
        yield sweep(0, everything, memory.weight_slab(everything, row, item, sums), hidden=False, head=True)


def gathered(call: Call, tokens: TokenRange) -> Iterator[tuple[TokenRange, Tensor]]:
    """(part of these tokens, its rows), a bounded number at a time."""
    size = min(memory.multiple(memory.HIDDEN // (call.pitch * call.item_size), 128), tokens.capacity)
    for at in range(0, tokens.capacity, size):
        part = TokenRange(tokens.tokens, tokens.first_token + at, min(size, tokens.capacity - at))
        yield part, gather(call, part)


def _low_rank(call: Call, tokens: TokenRange) -> LowRank:
    if call.lora_a is None:
        return LowRank()
    parts = [low_rank(call, rows) for _, rows in gathered(call, tokens)]
    return parts[0]._replace(product=torch.cat([part.product for part in parts])) if len(parts) > 1 else parts[0]


def _scales(upstream: Upstream, compute_dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """fp16 has no room for small upstream gradients: dz is multiplied by a power of two, and the sums divided by it."""
    if compute_dtype != torch.float16:
        return None, None
    largest = upstream.coef.abs().amax()
    if upstream.coef_entropy is not None:
        largest = torch.maximum(largest, upstream.coef_entropy.abs().amax())
    usable = (largest > 0) & torch.isfinite(largest)
    exponent = torch.where(usable, largest, 1.0).log2().ceil()
    return torch.exp2(-exponent), torch.exp2(exponent)
