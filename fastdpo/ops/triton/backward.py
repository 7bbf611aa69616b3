"""The Triton engine's backward: ranges of tokens by ranges of blocks, each routed or exact as the device finds.

dhidden   token range by token range, in fp32, and written once
dweight   vocabulary slab by slab, from all tokens, and written once: in the same sweep when one range holds all
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...head import Routing
from ..problem import Forward, Gradients, Head, Needs, Rows, Upstream
from . import lists
from .call import Call
from .common import BLOCK, RowTerms, TokenList
from .exact import exact
from .launch import on_device
from .lora_a import lora_a
from .routed_dz import Sets, routed_dz
from .routed_products import routed_dhidden, routed_dweight
from .sweep import Sweep, parts, sweeps
from .tokens import compact

# Share of live pairs up to which the routed kernels are used, by their costs per pair in units of one exact product:
# three gathered products of about 1.15, and rows of dhidden added at about 6, against 3. To be measured.
CROSSOVER = 0.3


def backward(
    head: Head,
    rows: Rows,
    saved: Forward,
    upstream: Upstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    entropy = None if upstream.coef_entropy is None else saved.entropy
    terms = RowTerms(saved.logps, saved.lse, entropy, upstream.coef, upstream.coef_entropy, upstream.coef_lse)
    coefs = upstream.active, upstream.coef_entropy, upstream.coef, upstream.coef_lse
    return gradients(Call(head, rows), saved, terms, coefs, routing, needs, sums, routed_dz)


def gradients(
    call: Call,
    saved,  # Forward, or what of it a divergence has
    terms: NamedTuple,  # what dz takes from its row
    # [M] fp32: what is not 0 in rows with an upstream gradient but the second's; the entropy's; and all others
    coefs: tuple[Tensor | None, ...],
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None,
    make_dz: Callable[..., None],  # routed_dz, or what else turns listed pairs into dz
) -> Gradients:
    places = sums or Gradients()
    grads = _allocate(call, needs, places)
    if call.num_rows == 0:
        return grads.added_to(sums)
    with on_device(call.device):
        # A routed call keeps the forward's tokens, whose indices are the generator's counters.
        active = (None, None) if routing is not None else coefs[:2]
        num_lists = sum(len(part.lists(call.num_blocks)) for part in parts(call, needs)) if routing is not None else 0
        items = torch.empty(num_lists, lists.ITEMS, dtype=torch.int32, device=call.device)
        tokens = compact(call, coef=active[0], coef_entropy=active[1], cleared=items if num_lists else None)
        ref_tokens = TokenList()
        if call.teacher is not None:
            ref_tokens = compact(call.teacher, coef=active[0], coef_entropy=active[1])
        items_of_lists = iter(items)
        for sweep in sweeps(
            *(call, tokens, ref_tokens, terms, coefs, grads, needs),
            routed=routing is not None,
            adds=places.weight is not None,
        ):
            out = None if sweep.dhidden is None else grads.hidden
            if routing is None:
                exact(sweep, range(call.num_blocks), None, out)
            else:
                sets = Sets.of(sweep, saved, routing)
                for blocks in sweep.part.lists(call.num_blocks):
                    listed = lists.empty(sweep, blocks, CROSSOVER, next(items_of_lists))
                    _routed(sweep, sets, listed, blocks, make_dz)
                    exact(sweep, blocks, listed.is_routed, out if blocks.stop == call.num_blocks else None)
            if sweep.dlow_rank is not None and grads.lora_a is not None:
                lora_a(sweep, grads.lora_a)
            del sweep  # the next one's sums take its place
    return grads.added_to(sums)


def _allocate(call: Call, needs: Needs, places: Gradients) -> Gradients:
    """To be written whole; zeros where there is no token. Kernels add to the place of dweight alone."""

    make = torch.empty if call.num_rows else torch.zeros
    grads = Gradients(places.hidden, places.weight)
    for name, like, wanted in zip(Needs._fields, call.head.inputs, needs):
        if wanted and getattr(grads, name) is None:
            place = getattr(places, name)
            shape = (call.num_rows, call.hidden_size) if name == "hidden" else like.shape
            dtype = (like if place is None else place).dtype
            setattr(grads, name, make(shape, dtype=dtype, device=call.device))
    return grads


def _routed(sweep: Sweep, sets: Sets, listed: lists.Lists, blocks: range, make_dz: Callable[..., None]) -> None:
    """Round by round: the list of pairs, their dz, and its products."""
    call, pairs = sweep.call, len(listed.tokens)
    dz = torch.empty(pairs, BLOCK.value, dtype=call.dtype, device=call.device)
    ratio = column_sums = None
    if sets.inside is not None:
        ratio = torch.empty(pairs, dtype=torch.float32, device=call.device)
    if sweep.dbias is not None:
        column_sums = torch.empty(pairs // call.pair_tile, BLOCK.value, dtype=torch.float32, device=call.device)
    for round in range(listed.rounds):
        lists.fill(sweep, sets.listed, listed, blocks, round, CROSSOVER)
        make_dz(sweep, sets, listed, blocks, round, dz, ratio, column_sums)
        for out, operand in sweep.by_token:
            routed_dhidden(sweep, listed, blocks, round, dz, ratio if sets.ratio_hidden else None, operand, out)
        routed_dweight(sweep, listed, blocks, round, dz, ratio if sets.ratio_weight else None, column_sums)
