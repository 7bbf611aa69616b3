"""One sweep of the backward through the vocabulary: of which tokens, for which gradients, in what memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Gradients, Needs
from . import memory
from .call import Call
from .common import LowRank, RowTerms, TokenList, TokenRange
from .tokens import low_rank


class Part(NamedTuple):
    """Of which tokens a sweep is, and for which gradients."""

    first_token: int
    capacity: int
    slab: tuple[int, int]  # of the exact kernel: (tokens of a chunk, blocks)
    of_hidden: bool
    of_head: bool

    def lists(self, num_blocks: int) -> list[range]:
        """Blocks whose pairs are counted together."""
        size = memory.list_blocks(self.capacity)
        return [range(first, min(first + size, num_blocks)) for first in range(0, num_blocks, size)]


@dataclass(frozen=True)
class Sweep:
    call: Call
    part: Part
    tokens: TokenRange
    terms: RowTerms | NamedTuple  # of a call of two heads its PairTerms
    coef: Tensor  # [M] fp32: 0 in rows without an upstream gradient
    ref_tokens: TokenList  # where such a call's teacher has its rows
    dz_scale: Tensor | None  # [] fp32: dz is multiplied by it before it is rounded,
    unscale: Tensor | None  # and its products by this
    low_rank: LowRank
    done: Tensor  # int32, of exact.py: as the sums that follow, zeros; of a routed call, once its pairs are counted
    dhidden: Tensor | None  # [capacity, H] fp32 sums
    dlow_rank: Tensor | None  # [capacity, pitch] fp32 sums: dz @ lora_b
    # gradients of the head, where the sweep has all tokens
    dweight: Tensor | None
    dbias: Tensor | None
    dlora_b: Tensor | None
    adds: tl.constexpr  # dweight to what is there
    lora_a_sums: Tensor | None  # [lora_rank, H] fp32, of all sweeps
    routed_pairs: int  # of the routed path, in memory at once

    @property
    def by_token(self) -> list[tuple[Tensor, Tensor]]:
        """(sums of dz @ operand, operand)."""
        hidden = [] if self.dhidden is None else [(self.dhidden, self.call.weight)]
        return hidden if self.dlow_rank is None else [*hidden, (self.dlow_rank, self.call.lora_b)]

    @property
    def of_head(self) -> bool:
        return not (self.dweight is None and self.dbias is None and self.dlora_b is None)


def parts(call: Call, needs: Needs) -> list[Part]:
    """For dhidden as many as its sums need, of a range of tokens each; one more for the head where one was not all."""
    item, sums = call.item_size, 4 * (call.hidden_size + call.low_rank_pitch)
    size, fits = memory.range_size(call.num_rows, item, sums)
    joint, found = needs.of_hidden and needs.of_weight and fits, []
    if needs.of_hidden:
        slab = memory.hidden_slab(size, item, sums)
        found = [Part(first, size, slab, True, joint) for first in range(0, call.num_rows, size)]
    if needs.of_weight and not joint:
        everything = triton.cdiv(call.num_rows, 128) * 128
        found.append(Part(0, everything, memory.weight_slab(everything, item, sums), False, True))
    return found


def sweeps(
    call: Call,
    tokens: TokenList,
    ref_tokens: TokenList,
    terms: RowTerms | NamedTuple,
    coefs: tuple[Tensor | None, ...],
    grads: Gradients,
    needs: Needs,
    *,
    routed: bool,
    adds: bool = False,
) -> Iterator[Sweep]:
    """Of every one of the `parts`; `coefs`: as `gradients` of backward.py takes them."""
    scales = _scales(coefs[1:], call.dtype)
    lora_a_sums = None
    if needs.lora_a:
        lora_a_sums = torch.empty(call.lora_rank, call.hidden_size, dtype=torch.float32, device=call.device)
    sums = 4 * (call.hidden_size + call.low_rank_pitch)
    make = partial(torch.empty if routed else torch.zeros, device=call.device)

    def by_token(capacity: int, columns: int, wanted: bool) -> Tensor | None:
        return make(capacity, columns, dtype=torch.float32) if wanted else None

    for part in parts(call, needs):
        tokens_of_part = TokenRange(tokens, part.first_token, part.capacity)
        steps = triton.cdiv(part.capacity, part.slab[0]) * triton.cdiv(call.num_blocks, part.slab[1])
        yield Sweep(
            call,
            part,
            tokens_of_part,
            terms,
            coefs[0],
            ref_tokens,
            *scales,
            low_rank(call, tokens_of_part),
            make(1 + 2 * steps, dtype=torch.int32),
            by_token(part.capacity, call.hidden_size, part.of_hidden and needs.hidden),
            by_token(part.capacity, call.low_rank_pitch, part.of_hidden and call.lora_a is not None),
            *((grads.weight, grads.bias, grads.lora_b) if part.of_head else (None, None, None)),
            tl.constexpr(adds),
            lora_a_sums,
            memory.routed_pairs(part.capacity * sums * part.of_hidden, call.item_size),
        )


def _scales(coefs: tuple[Tensor | None, ...], compute_dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """fp16 has no room for small upstream gradients: dz is multiplied by a power of two, and the sums divided by it."""
    if compute_dtype != torch.float16:
        return None, None
    largest = torch.stack([x.abs().amax() for x in coefs if x is not None]).amax()
    usable = (largest > 0) & torch.isfinite(largest)
    exponent = torch.where(usable, largest, 1.0).log2().ceil()
    return torch.exp2(-exponent), torch.exp2(exponent)
