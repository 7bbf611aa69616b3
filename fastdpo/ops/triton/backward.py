"""The Triton engine's backward: ranges of tokens by ranges of blocks, each routed or exact as the device finds.

dhidden   token range by token range, in fp32, and written once
dweight   vocabulary slab by slab, from all tokens, and written once: in the same sweep when one range holds all
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...head import Routing
from ..problem import Forward, Gradients, Head, Needs, Rows, Upstream
from . import lists, memory
from .call import Call
from .common import BLOCK
from .exact import dlora_a, exact
from .launch import on_device
from .routed_dz import Sets, routed_dz
from .routed_products import routed_dhidden, routed_dweight
from .sweep import Sweep, sweeps
from .tokens import compact, spread

# Share of live pairs up to which the routed kernels are used, by their costs per pair in units of one exact product:
# three gathered products of about 1.15, and rows of dhidden added at about 6, against 3. To be measured.
CROSSOVER = 0.3


def backward(
    head: Head, rows: Rows, saved: Forward, upstream: Upstream, routing: Routing | None, needs: Needs
) -> Gradients:
    call = Call(head, rows)
    grads = _allocate(call, needs)
    if call.num_rows == 0:
        return grads
    with on_device(call.device):
        # A routed call keeps the forward's tokens, whose indices are the generator's counters.
        coefs = (None, None) if routing is not None else (upstream.coef, upstream.coef_entropy)
        tokens = compact(call, coef=coefs[0], coef_entropy=coefs[1])
        for sweep in sweeps(call, tokens, saved, upstream, grads, needs):
            if routing is None:
                exact(sweep, range(call.num_blocks), None)
            else:
                sets, size = Sets.of(sweep, saved, routing), memory.list_blocks(sweep.tokens.capacity)
                for first_block in range(0, call.num_blocks, size):
                    blocks = range(first_block, min(first_block + size, call.num_blocks))
                    listed = lists.build(sweep, sets.listed, blocks, CROSSOVER)
                    _routed(sweep, sets, listed, blocks)
                    if CROSSOVER < 1:
                        exact(sweep, blocks, listed.is_routed)
            if sweep.dlow_rank is not None:
                _through_lora_a(sweep, grads.lora_a)
            if sweep.dhidden is not None:
                spread(call, sweep.tokens, sweep.dhidden, sweep.unscale, grads.hidden)
            del sweep  # the next one's sums take its place
    return grads


def _allocate(call: Call, needs: Needs) -> Gradients:
    """To be written whole; zeros where there is no token."""

    def like(x: Tensor | None, wanted: bool) -> Tensor | None:
        make = torch.empty if call.num_rows else torch.zeros
        return make(x.shape, dtype=x.dtype, device=call.device) if wanted else None

    hidden = None
    if needs.hidden:
        hidden = torch.empty(call.num_rows, call.hidden_size, dtype=call.head.hidden.dtype, device=call.device)
    return Gradients(hidden, *map(like, call.head.inputs[1:], needs[1:]))


def _routed(sweep: Sweep, sets: Sets, listed: lists.Lists, blocks: range) -> None:
    """Round by round: the list of pairs, their dz, and its products."""
    call, pairs = sweep.call, len(listed.tokens)
    dz = torch.empty(pairs, BLOCK.value, dtype=call.dtype, device=call.device)
    ratio = column_sums = None
    if sets.inside is not None:
        ratio = torch.empty(pairs, dtype=torch.float32, device=call.device)
    if sweep.dbias is not None:
        column_sums = torch.empty(pairs // call.pair_tile, BLOCK.value, dtype=torch.float32, device=call.device)
    for round in range(listed.rounds):
        lists.fill(sweep, sets.listed, listed, blocks, round)
        routed_dz(sweep, sets, listed, blocks, round, dz, ratio, column_sums)
        for out, operand in sweep.by_token:
            routed_dhidden(sweep, listed, blocks, round, dz, ratio if sets.ratio_hidden else None, operand, out)
        routed_dweight(sweep, listed, blocks, round, dz, ratio if sets.ratio_weight else None, column_sums)


def _through_lora_a(sweep: Sweep, out: Tensor | None) -> None:
    """dz @ lora_b -> dhidden's part of it and dlora_a = lora_scale * dlow_rank.T @ hidden."""
    call, scale = sweep.call, sweep.call.head.lora.scale
    if sweep.dhidden is not None:
        lora_a = call.lora_a.to(call.dtype).float()
        sweep.dhidden.addmm_(sweep.dlow_rank[:, : call.lora_rank], lora_a, alpha=scale)
    if out is not None:
        sweep.dlow_rank.mul_(scale)
        dlora_a(sweep, out)
