"""The Triton engine's backward: ranges of tokens by ranges of blocks, each routed or exact as the device finds.

dhidden   token range by token range, in fp32, and written once
dweight   vocabulary slab by slab, from all tokens, and written once: in the same sweep when one range holds all
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK, set_bytes
from ..problem import Forward, Gradients, Head, Needs, Rows, Upstream
from . import lists as triton_lists
from . import memory
from .exact import dhidden_kernel, dweight_kernel, dz_kernel, spread_kernel
from .launch import DTYPES, launch, on_device
from .operands import Operands, operands
from .routed import ordered_dhidden_kernel, routed_dhidden_kernel, routed_dweight_kernel, routed_dz_kernel

# Share of live pairs up to which the routed kernels are used, by their costs per pair in units of one exact product:
# three gathered products of about 1.15, and rows of dhidden added at about 6, against 3. To be measured.
CROSSOVER = 0.3


def backward(
    head: Head, rows: Rows, saved: Forward, upstream: Upstream, routing: Routing | None, needs: Needs
) -> Gradients:
    ops = Operands(head, rows)

    def zeros(like: Tensor | None, wanted: bool, make=torch.zeros) -> Tensor | None:
        return make(like.shape, dtype=like.dtype, device=ops.device) if wanted else None

    some = ops.num_rows > 0
    grads = Gradients(
        hidden=torch.empty(ops.num_rows, ops.hidden_size, dtype=head.hidden.dtype, device=ops.device)
        if needs.hidden
        else None,
        weight=zeros(head.weight, needs.weight, torch.empty if some else torch.zeros),
        bias=zeros(head.bias, needs.bias, torch.empty if some else torch.zeros),
        lora_a=zeros(ops.lora_a, needs.lora_a),
        lora_b=zeros(ops.lora_b, needs.lora_b, torch.empty if some else torch.zeros),
    )
    if some:
        with on_device(ops.device):
            _Sweep(ops, saved, upstream, routing, grads, needs).run()
    return grads


@dataclass(frozen=True)
class _Unit:
    """Tokens [first, first + capacity), whose gradients are wanted in one sweep."""

    first: int
    capacity: int
    dhidden: Tensor | None  # [capacity, H] fp32 sums
    drank: Tensor | None  # [capacity, R] fp32 sums: dz @ lora_b
    weight: bool  # this sweep makes the gradients of weight, bias and lora_b: it has all tokens
    rank: Tensor | None  # [capacity, R] fp32
    slab: tuple[int, int]  # of the exact path: (tokens of a chunk, blocks)
    routed_pairs: int  # of the routed path, in memory at once
    routed: bool
    second: bool  # the smaller set of pairs is all that is wanted
    ratio_hidden: bool  # the larger set is listed, and dhidden takes the smaller one inside it
    ratio_weight: bool


class _Sweep:
    def __init__(
        self, ops: Operands, saved: Forward, upstream: Upstream, routing: Routing | None, grads: Gradients, needs: Needs
    ):
        self.ops, self.saved, self.upstream, self.routing, self.grads, self.needs = (
            ops, saved, upstream, routing, grads, needs,
        )  # fmt: skip
        # A routed call keeps the forward's tokens, whose indices are the generator's counters.
        self.tokens = ops.compact(upstream=None if routing is not None else upstream)
        self.lora_a_sums: Tensor | None = None
        self.dz_tile = ops.tile("dz", entropy=upstream.coef_entropy is not None)
        self.scale, self.unscale = _scales(upstream, ops.head.compute_dtype)

    def run(self) -> None:
        ops, needs = self.ops, self.needs
        everything = triton.cdiv(ops.num_rows, 128) * 128
        size, fits = memory.range_size(ops.num_rows, self._row, 4 * (ops.hidden_size + ops.rank_pitch))
        joint = needs.of_hidden and needs.of_weight and fits
        if needs.of_hidden:
            for first in range(0, ops.num_rows, size):
                self._hidden_range(self._unit(first, size, hidden=True, weight=joint))
        if needs.of_weight and not joint:
            self._blocks(self._unit(0, everything, hidden=False, weight=True))

    def _unit(self, first: int, capacity: int, *, hidden: bool, weight: bool) -> _Unit:
        ops, needs, routing = self.ops, self.needs, self.routing

        def sums(columns: int, wanted: bool) -> Tensor | None:
            return torch.zeros(capacity, columns, dtype=torch.float32, device=ops.device) if wanted else None

        smaller_hidden = smaller_weight = False  # which gradient takes the smaller set
        if routing is not None and routing.second_tau is not None:
            smaller_hidden = hidden and routing.hidden_set == 1
            smaller_weight = weight and routing.weight_set == 1
        both = hidden and weight
        low_rank = ops.lora_a is not None
        held = 4 * (ops.hidden_size + ops.rank_pitch) * hidden  # per token
        if hidden:
            slab = memory.hidden_slab(capacity, self._row, ops.item_size, held, joint=weight)
        else:
            slab = memory.weight_slab(capacity, self._row, ops.item_size, 4 * (ops.hidden_size + ops.rank_pitch))
        return _Unit(
            first, capacity,
            sums(ops.hidden_size, hidden and needs.hidden), sums(ops.rank_pitch, hidden and low_rank), weight,
            self._rank(first, capacity) if low_rank else None,
            slab, memory.routed_pairs(capacity * held, ops.item_size), routing is not None,
            second=(smaller_hidden or smaller_weight) and not both,
            ratio_hidden=smaller_hidden and both, ratio_weight=smaller_weight and both,
        )  # fmt: skip

    def _rank(self, first: int, capacity: int) -> Tensor:
        """[capacity, R]"""
        parts = [self.ops.rank(rows) for _, rows in self._gathered(first, capacity)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def _row(self) -> int:
        """Bytes of a gathered row."""
        return self.ops.pitch * self.ops.item_size

    def _gathered(self, first: int, capacity: int):
        """(offset, rows of a part of these tokens), a bounded number at a time."""
        size = min(memory.multiple(memory.HIDDEN // self._row, 128), capacity)
        for at in range(0, capacity, size):
            yield at, self.ops.gather(self.tokens, first + at, min(size, capacity - at))

    def _hidden_range(self, unit: _Unit) -> None:
        ops, grads, tokens = self.ops, self.grads, self.tokens
        self._blocks(unit)
        if unit.drank is not None:
            drank = unit.drank[:, : ops.rank_size]
            if unit.dhidden is not None:
                lora_a = ops.lora_a.to(ops.head.compute_dtype).float()
                unit.dhidden.addmm_(drank, lora_a, alpha=ops.head.lora.scale)
            if grads.lora_a is not None:
                self._lora_a(unit)
        if unit.dhidden is not None:
            launch(
                spread_kernel, (triton.cdiv(ops.num_rows, 16), triton.cdiv(ops.hidden_size, 256)),
                unit.dhidden, tokens.position, self.unscale, grads.hidden,
                ops.num_rows, unit.first, unit.capacity, ops.hidden_size, BM=16, BK=256,
            )  # fmt: skip

    def _blocks(self, unit: _Unit) -> None:
        ops = self.ops
        if not unit.routed:
            self._exact(unit, 0, ops.num_blocks, None)
            return
        pairs = triton_lists.Pairs(
            self._set(second=unit.second), self.saved.most_pairs, self.upstream.coef, self.tokens.rows,
            self.tokens.count, unit.first, unit.capacity, ops.num_blocks,
        )  # fmt: skip
        size = memory.list_blocks(triton.cdiv(unit.capacity, triton_lists.TOKENS))
        for first_block in range(0, ops.num_blocks, size):
            count = min(size, ops.num_blocks - first_block)
            lists = triton_lists.build(
                pairs, first_block, count,
                tile=ops.tile("routed_dz").m, max_pairs_in_memory=unit.routed_pairs, crossover=CROSSOVER,
            )  # fmt: skip
            self._routed(unit, first_block, count, lists)
            if CROSSOVER < 1:
                self._exact(unit, first_block, first_block + count, lists.is_routed)

    def _set(self, *, second: bool) -> Tensor:
        """[M, bytes]: the pairs kept at the smaller tau, or the second, smaller set inside them."""
        one = set_bytes(self.ops.num_blocks)
        return self.saved.bitmap[:, one:] if second else self.saved.bitmap[:, :one]

    # The routed path

    def _routed(self, unit: _Unit, first_block: int, count: int, lists: triton_lists.Lists) -> None:
        ops, grads, saved, tokens = self.ops, self.grads, self.saved, self.tokens
        shape = ops.tile("routed_dz")
        pairs = lists.tiles_in_memory * shape.m
        dz = torch.empty(pairs, BLOCK, dtype=ops.head.compute_dtype, device=ops.device)
        two = unit.ratio_hidden or unit.ratio_weight
        ratio = torch.empty(pairs, dtype=torch.float32, device=ops.device) if two else None
        bias = unit.weight and grads.bias is not None
        column_sums = (
            torch.empty(lists.tiles_in_memory, BLOCK, dtype=torch.float32, device=ops.device) if bias else None
        )
        second_tau = self.routing.second_tau
        tma = ops.tma(ops.weight)
        (weight,) = operands(tma, (ops.weight, BLOCK, shape.k))
        listed = (lists.tile_block, lists.tokens, lists.lengths, lists.first_tile, lists.round_block, lists.is_routed)
        programs = ops.target.programs * shape.per_sm
        for round in range(lists.rounds):
            lists.fill(round)
            launch(
                routed_dz_kernel, (programs,),
                ops.hidden, weight, ops.bias, unit.rank, ops.lora_b, tokens.rows, tokens.labels,
                saved.logps, saved.lse, self.upstream.coef, self.scale,
                self._set(second=True) if two else None, *listed, dz, ratio, column_sums,
                round, unit.first, first_block, ops.vocab_size, ops.hidden_size, *ops.strides,
                ops.weight.stride(0), ops.rank_size, saved.bitmap.stride(0), *ops.transform,
                self.routing.tau, 0.0 if second_tau is None else second_tau,
                **ops.variant, TMA=tma, SECOND=unit.second, RATIO_WEIGHT=unit.ratio_weight,
                TILE=shape.m, BK=shape.k, PROGRAMS=programs,
                warps=shape.warps, stages=shape.stages,
            )  # fmt: skip
            ratio_hidden = ratio if unit.ratio_hidden else None
            for out, operand in ((unit.dhidden, ops.weight), (unit.drank, ops.lora_b)):
                if out is not None:
                    self._routed_dhidden(dz, ratio_hidden, operand, lists, out, round, first_block, shape.m)
            ratio_weight = ratio if unit.ratio_weight else None
            if unit.weight and (grads.weight is not None or grads.bias is not None):
                self._routed_dweight(
                    dz, ratio_weight, column_sums, ops.hidden, tokens.rows, listed[1:], grads.weight, grads.bias,
                    round, unit.first, first_block, count, shape.m, ops.hidden_size, ops.strides,
                )  # fmt: skip
            if unit.weight and grads.lora_b is not None:
                self._routed_dweight(
                    dz, ratio_weight, None, unit.rank, None, listed[1:], grads.lora_b, None,
                    round, unit.first, first_block, count, shape.m, ops.rank_size, (1, 0, ops.rank_pitch),
                )  # fmt: skip

    def _routed_dhidden(self, dz, ratio, weight, lists, out, round, first_block, pair_tile) -> None:
        ops, low_rank, columns = self.ops, weight is self.ops.lora_b, weight.shape[1]
        compute, precision = self._arithmetic(low_rank)
        ordered = torch.are_deterministic_algorithms_enabled()
        shape = ops.tile("ordered_dhidden" if ordered else "routed_dhidden", columns, low_rank=low_rank)
        programs, parts = ops.target.programs * shape.per_sm, triton.cdiv(columns, shape.n)
        constants = {"COMPUTE": compute, "PRECISION": precision, "TILE": pair_tile, "BN": shape.n}
        constants |= {"warps": shape.warps, "stages": shape.stages}
        if ordered:
            token_tiles, num_blocks = lists.running.shape
            group_tiles = triton.cdiv(token_tiles * parts, programs)
            launch(
                ordered_dhidden_kernel, (parts, triton.cdiv(token_tiles, group_tiles)),
                dz, ratio, weight, lists.tokens, lists.running, lists.first_tile, lists.round_block, lists.is_routed,
                out, round, first_block, num_blocks, ops.vocab_size, columns, weight.stride(0), out.stride(0),
                token_tiles, group_tiles, ROWS=shape.m, **constants,
            )  # fmt: skip
        else:
            launch(
                routed_dhidden_kernel, (programs,),
                dz, ratio, weight, lists.tile_block, lists.tokens, lists.lengths, lists.first_tile, lists.round_block,
                lists.is_routed, out, round, first_block, ops.vocab_size, columns, weight.stride(0), out.stride(0),
                BK=shape.k, PROGRAMS=programs, **constants,
            )  # fmt: skip

    def _routed_dweight(
        self, dz, ratio, column_sums, hidden, rows, listed, out, out_bias,
        round, first, first_block, count, pair_tile, columns, strides,
    ) -> None:  # fmt: skip
        ops, low_rank = self.ops, rows is None
        compute, precision = self._arithmetic(low_rank)
        shape = ops.tile("routed_dweight", columns, low_rank=low_rank)
        launch(
            routed_dweight_kernel, (triton.cdiv(columns, shape.n), count),
            dz, ratio, column_sums, hidden, rows, *listed, self.unscale, out, out_bias,
            round, first, first_block, ops.vocab_size, columns, *strides, 0 if out is None else out.stride(0),
            COMPUTE=compute, PRECISION=precision, TILE=pair_tile, BN=shape.n, BK=shape.k,
            warps=shape.warps, stages=shape.stages,
        )  # fmt: skip

    def _arithmetic(self, low_rank: bool):
        """(type, precision) to multiply in: the few columns of a low-rank head in fp32."""
        return (DTYPES[torch.float32], "tf32x3") if low_rank else (self.ops.compute, self.ops.precision)

    # The exact path

    def _exact(self, unit: _Unit, first_block: int, last_block: int, flag: Tensor | None) -> None:
        """Chunks of tokens by slabs of blocks; a slab's dweight is summed over several chunks in fp32."""
        ops = self.ops
        size, blocks = unit.slab
        chunks = range(0, unit.capacity, size)
        several = unit.weight and len(chunks) > 1
        blocks = min(blocks, last_block - first_block)
        slabs = range(first_block, last_block, blocks)
        dz = torch.empty(size, blocks * BLOCK, dtype=ops.head.compute_dtype, device=ops.device)
        bias = unit.weight and self.grads.bias is not None
        column_sums = (
            torch.empty(triton.cdiv(size, self.dz_tile.m), dz.shape[1], dtype=torch.float32, device=ops.device)
            if bias
            else None
        )
        partial = _Partial(self.grads, blocks * BLOCK, ops) if several else None
        order = (
            ((at, slab) for slab in slabs for at in chunks)
            if several
            else ((at, slab) for at in chunks for slab in slabs)
        )
        held = None
        for at, slab in order:
            first, rows = unit.first + at, min(size, unit.capacity - at)  # a range need not be whole chunks
            columns = (slab * BLOCK, min((slab + blocks) * BLOCK, last_block * BLOCK, ops.vocab_size))
            if held != at:
                held, hidden, chunk_dz = at, ops.gather(self.tokens, first, rows, flag), dz[:rows]
            rank = None if unit.rank is None else unit.rank[at : at + rows]
            self._dz(first, hidden, rank, columns, chunk_dz, column_sums, flag)
            for out, operand in ((unit.dhidden, ops.weight), (unit.drank, ops.lora_b)):
                if out is not None:
                    self._dhidden(first, chunk_dz, operand, columns, out[at : at + rows], flag)
            if unit.weight:
                ends = (at == chunks[0], at == chunks[-1])
                self._dweights(first, chunk_dz, column_sums, hidden, rank, columns, partial, ends, flag)

    def _dz(self, first: int, hidden: Tensor, rank, columns: tuple[int, int], dz: Tensor, column_sums, flag) -> None:
        ops, saved, upstream, tokens = self.ops, self.saved, self.upstream, self.tokens
        shape = self.dz_tile
        tma = ops.tma(hidden, ops.weight)
        a, b = operands(tma, (hidden, shape.m, shape.k), (ops.weight, shape.n, shape.k))
        coef_entropy = upstream.coef_entropy
        programs = ops.target.programs * shape.per_sm
        launch(
            dz_kernel, (programs,),
            a, b, ops.bias, rank, ops.lora_b, tokens.rows, tokens.labels, tokens.count, saved.logps, saved.lse,
            None if coef_entropy is None else saved.entropy, upstream.coef, coef_entropy, self.scale, flag,
            dz, column_sums,
            first, dz.shape[0], *columns, dz.shape[1], ops.vocab_size, ops.hidden_size, ops.pitch,
            ops.weight.stride(0), ops.rank_size, *ops.transform,
            wanted=0, **ops.variant, TMA=tma, BM=shape.m, BN=shape.n, BK=shape.k, GROUP=shape.group,
            PROGRAMS=programs, warps=shape.warps, stages=shape.stages,
        )  # fmt: skip

    def _dhidden(self, first: int, dz: Tensor, weight: Tensor, columns: tuple[int, int], out: Tensor, flag) -> None:
        ops, low_rank = self.ops, weight is self.ops.lora_b
        compute, precision = self._arithmetic(low_rank)
        shape = ops.tile("dhidden", weight.shape[1], low_rank=low_rank)
        tma = ops.tma(dz, weight) and not low_rank
        a, b = operands(tma, (dz, shape.m, shape.k), (weight, shape.k, shape.n))
        programs = ops.target.programs * shape.per_sm
        launch(
            dhidden_kernel, (programs,),
            a, b, self.tokens.count, flag, out, first, dz.shape[0], *columns, dz.shape[1],
            ops.vocab_size, weight.shape[1], weight.stride(0), out.stride(0),
            wanted=0, COMPUTE=compute, TMA=tma, PRECISION=precision, BM=shape.m, BN=shape.n, BK=shape.k,
            GROUP=shape.group, PROGRAMS=programs, warps=shape.warps, stages=shape.stages,
        )  # fmt: skip

    def _dweights(self, first, dz, column_sums, hidden, rank, columns, partial, ends, flag) -> None:
        ops, grads = self.ops, self.grads
        if grads.weight is not None or grads.bias is not None:
            sums = (None, None) if partial is None else (partial.weight, partial.bias)
            self._dweight(
                first, dz, column_sums, hidden, columns, sums, grads.weight, grads.bias, ops.hidden_size, ends, flag
            )
        if grads.lora_b is not None:
            sums = (None, None) if partial is None else (partial.lora_b, None)
            self._dweight(first, dz, None, rank, columns, sums, grads.lora_b, None, ops.rank_size, ends, flag)

    def _dweight(
        self, first, dz, column_sums, hidden, columns, partial, out, out_bias, out_columns, ends, flag, kind="dweight"
    ) -> None:
        ops, low_rank = self.ops, kind == "dlora_a" or hidden.dtype != self.ops.head.compute_dtype
        compute, precision = self._arithmetic(low_rank)
        shape = ops.tile(kind, out_columns, low_rank=low_rank)
        tma = ops.tma(dz, hidden) and not low_rank
        a, b = operands(tma, (dz, shape.k, shape.m), (hidden, shape.k, shape.n))
        programs = ops.target.programs * shape.per_sm
        launch(
            dweight_kernel, (programs,),
            a, column_sums, b, self.tokens.count, flag, self.unscale, *partial, out, out_bias,
            first, dz.shape[0], *columns, dz.stride(0), out_columns, hidden.stride(0),
            0 if out is None else out.stride(0),
            self.dz_tile.m, 0 if ends[0] else columns[1] - columns[0],
            LAST=ends[1], wanted=0, COMPUTE=compute, TMA=tma, PRECISION=precision, BM=shape.m, BN=shape.n, BK=shape.k,
            GROUP=shape.group, PROGRAMS=programs, warps=shape.warps, stages=shape.stages,
        )  # fmt: skip

    def _lora_a(self, unit: _Unit) -> None:
        """lora_scale * drank.T @ hidden, chunk by chunk in fp32; padding rows of both are zero."""
        ops = self.ops
        unit.drank.mul_(ops.head.lora.scale)
        if self.lora_a_sums is None:
            self.lora_a_sums = torch.empty(ops.rank_size, ops.hidden_size, dtype=torch.float32, device=ops.device)
        for at, rows in self._gathered(unit.first, unit.capacity):
            first = unit.first + at
            ends = (first == 0, first + len(rows) >= ops.num_rows)
            self._dweight(
                first, unit.drank[at : at + len(rows)], None, rows, (0, ops.rank_size),
                (self.lora_a_sums, None), self.grads.lora_a, None, ops.hidden_size, ends, None, kind="dlora_a",
            )  # fmt: skip
            if ends[1]:
                break


class _Partial:
    """fp32 sums of a slab's gradients over the chunks of tokens seen so far."""

    def __init__(self, grads: Gradients, columns: int, ops: Operands):
        def sums(like: Tensor | None, *shape: int) -> Tensor | None:
            return None if like is None else torch.empty(shape, dtype=torch.float32, device=ops.device)

        self.weight = sums(grads.weight, columns, ops.hidden_size)
        self.bias = sums(grads.bias, columns)
        self.lora_b = sums(grads.lora_b, columns, ops.rank_size)


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
