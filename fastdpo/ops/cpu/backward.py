"""The CPU engine's backward: recompute a tile, turn it into dz, multiply twice.

    exact    tiles of many tokens by many columns, one after the other, every product on all threads
    routed   blocks of 128 columns by the tokens that kept them, one block per thread and no barrier between blocks

dhidden is summed block by block in vocabulary order either way, so its bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK, num_blocks, set_bytes
from ..native import address
from ..problem import Forward, Gradients, Head, Needs, Tokens, Upstream
from .gemm import matmul, padded_rows
from .operands import TILE_BYTES, Operands
from .workers import in_order

BUFFER_BYTES = 16 << 20  # fp32 dhidden of the tokens swept together; more tokens are swept in ranges
# Above this share of live pairs the exact backward is cheaper: gathered rows cost about 1.2 times dense ones, and it
# reads nothing twice. Flat distributions end here.
CROSSOVER = 0.7


def backward(
    head: Head, tokens: Tokens, saved: Forward, upstream: Upstream, routing: Routing | None, needs: Needs
) -> Gradients:
    ops, device = Operands(head, tokens), head.hidden.device
    fp32 = {"dtype": torch.float32, "device": device}
    grads = Gradients(
        hidden=torch.zeros(tokens.num_rows, ops.hidden_size, dtype=head.hidden.dtype, device=device)
        if needs.hidden
        else None,
        weight=torch.zeros(head.weight.shape, dtype=head.weight.dtype, device=device) if needs.weight else None,
        bias=torch.zeros(head.bias.shape, **fp32) if needs.bias else None,
        lora_a=torch.zeros(head.lora.a.shape, **fp32) if needs.lora_a else None,
        lora_b=torch.zeros(head.lora.b.shape, **fp32) if needs.lora_b else None,
    )
    add_tiles = _Exact(ops, saved, upstream)
    if routing is not None:
        routed = _Routed(ops, saved, upstream, routing)
        if routed.most_live <= CROSSOVER:
            add_tiles = routed

    count = len(tokens)
    size = max(1, BUFFER_BYTES // (4 * ops.hidden_size)) if needs.of_hidden else max(count, 1)
    # Adding token ranges up in a half-precision dweight would round at every range: then dweight has its own sweep.
    joint = needs.of_weight and (count <= size or not needs.weight or head.weight.dtype == torch.float32)
    for start in range(0, count, size):
        sums = _TokenSums(ops, grads, start, min(start + size, count)) if needs.of_hidden else None
        add_tiles(start, min(start + size, count), sums, grads if joint else None)
        if sums is not None:
            sums.finish()
    if needs.of_weight and not joint:
        add_tiles(0, count, None, grads)
    for name, like in zip(("bias", "lora_a", "lora_b"), head.inputs[2:]):
        if getattr(grads, name) is not None:
            setattr(grads, name, getattr(grads, name).to(like.dtype))
    return grads


class _TokenSums:
    """fp32 sums over the vocabulary for tokens [start, stop): dz @ weight and, for a low-rank head, dz @ lora_b."""

    def __init__(self, ops: Operands, grads: Gradients, start: int, stop: int):
        self.ops, self.grads, self.start, self.stop = ops, grads, start, stop
        fp32 = {"dtype": torch.float32, "device": ops.head.hidden.device}
        self.dhidden = torch.zeros(stop - start, ops.hidden_size, **fp32)
        self.drank = None if ops.lora_a is None else torch.zeros(stop - start, ops.lora_a.shape[0], **fp32)

    def products(self, dz: Tensor, weight: Tensor, first: int) -> tuple[Tensor | None, Tensor | None]:
        lora_b = self.ops.lora_b
        dhidden = None if self.grads.hidden is None else matmul(dz, weight.T)
        drank = None if lora_b is None else dz @ lora_b[first : first + weight.shape[0]]
        return dhidden, drank

    def add(self, products: tuple[Tensor | None, Tensor | None], token_list: Tensor | None, start: int = 0) -> None:
        """Adds the rows of `products` to the listed int32 tokens, or to consecutive ones from `start`."""
        for target, product in zip((self.dhidden, self.drank), products):
            if product is None:
                continue
            if token_list is None:
                target[start - self.start : start - self.start + product.shape[0]] += product
                continue
            self.ops.native.scatter_add_rows(
                address(target, torch.float32) - 4 * self.start * target.stride(0),
                target.stride(0),
                address(product, torch.float32, rows=True),
                product.stride(0),
                address(token_list, torch.int32),
                0,
                token_list.shape[0],
                target.shape[1],
                1,
            )

    def finish(self) -> None:
        ops, grads, start, stop = self.ops, self.grads, self.start, self.stop
        if self.drank is not None:
            if grads.lora_a is not None:
                size = ops.chunk_rows()
                for first in range(start, stop, size):
                    last = min(first + size, stop)
                    part = self.drank[first - start : last - start]
                    grads.lora_a.addmm_(part.T, ops.hidden(first, last), alpha=ops.head.lora.scale)
            self.dhidden.addmm_(self.drank, ops.lora_a)
        if grads.hidden is not None:
            rows = slice(start, stop) if ops.tokens.rows is None else ops.tokens.rows[start:stop]
            grads.hidden[rows] = self.dhidden.to(grads.hidden.dtype)


class _WeightProducts(NamedTuple):
    """What one tile adds to the rows from `first` of dweight, dbias and dlora_b."""

    first: int
    dweight: Tensor | None
    dbias: Tensor | None
    dlora_b: Tensor | None

    @staticmethod
    def of(grads: Gradients, first: int, dz: Tensor, hidden: Tensor, rank: Tensor | None) -> _WeightProducts:
        return _WeightProducts(
            first,
            None if grads.weight is None else matmul(dz.T, hidden.T),
            None if grads.bias is None else dz.sum(0),
            None if grads.lora_b is None else dz.T @ rank,
        )

    def plus(self, other: _WeightProducts | None) -> _WeightProducts:
        for mine, product in zip(self[1:], other[1:] if other is not None else ()):
            if mine is not None:
                mine += product
        return self

    def add_to(self, grads: Gradients) -> None:
        for target, product in zip((grads.weight, grads.bias, grads.lora_b), self[1:]):
            if product is not None:
                target[self.first : self.first + product.shape[0]] += product


class _Exact:
    """Every column of every token."""

    def __init__(self, ops: Operands, saved: Forward, upstream: Upstream):
        self.ops, self.saved, self.upstream = ops, saved, upstream

    def __call__(self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None) -> None:
        ops, size = self.ops, self.ops.chunk_rows()
        chunks = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
        cols = ops.slab_cols(min(size, stop - start))
        hidden = rank = None
        for first in range(0, ops.vocab_size, cols):
            weight = ops.weight(first, min(first + cols, ops.vocab_size))
            slab = None  # summed over the chunks in fp32, rounded once
            for chunk in chunks:
                if hidden is None or len(chunks) > 1:
                    hidden = ops.hidden(chunk.start, chunk.stop)
                    rank = ops.rank(hidden)
                dz = ops.products(hidden, rank, weight, first)
                self._to_dz(dz, chunk, first)
                if sums is not None:
                    sums.add(sums.products(dz, weight, first), None, chunk.start)
                if grads is not None:
                    slab = _WeightProducts.of(grads, first, dz, hidden, rank).plus(slab)
            if slab is not None:
                slab.add_to(grads)

    def _to_dz(self, products: Tensor, chunk: slice, first: int) -> None:
        ops, saved, upstream = self.ops, self.saved, self.upstream
        entropy = coef_entropy = 0
        if upstream.coef_entropy is not None:
            entropy, coef_entropy = address(saved.entropy[chunk]), address(upstream.coef_entropy[chunk])
        ops.native.grad(
            ops.tile(products, products.shape[0], first),
            address(ops.tokens.labels[chunk]),
            address(saved.lse[chunk]),
            address(saved.logps[chunk]),
            address(upstream.coef[chunk]),
            entropy,
            coef_entropy,
            ops.threads,
        )


class _Routed:
    """The kept pairs: per block gather its tokens' rows, recompute 128 columns, weight them by 1 / q.

    A block's rows of dweight are its own, so the thread that has the block writes them. dhidden crosses blocks: the
    calling thread adds up what the others return, in order; so it does for a block of more tokens than one piece.
    """

    def __init__(self, ops: Operands, saved: Forward, upstream: Upstream, routing: Routing):
        self.ops, self.saved, self.upstream, self.routing = ops, saved, upstream, routing
        self.num_blocks = num_blocks(ops.vocab_size)
        # [N, bytes] of the larger set, kept at `tau`, and of the smaller one inside it, if there is one
        self.sets = saved.bitmap.split(set_bytes(self.num_blocks), 1)
        self.counts: dict[int, Tensor] = {}  # of each set that was listed: pairs per block

    @property
    def most_live(self) -> float:
        """The share of pairs that live at most, whatever the draw: a decision that saw the draw would bias the mean."""
        most = self.saved.most_pairs.masked_fill(self.upstream.coef == 0, 0).sum().item()
        return most / max(1, len(self.ops.tokens) * self.num_blocks)

    def __call__(self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None) -> None:
        ops = self.ops.serial()
        # Tokens a thread works on at once, so that all threads together stay within a few tiles and kernels are few.
        size = min(1024, max(64, ops.chunk_rows() // self.ops.threads))
        hidden_set = -1 if sums is None else self.routing.hidden_set
        weight_set = -1 if grads is None else self.routing.weight_set
        listed = min(which for which in (hidden_set, weight_set) if which >= 0)
        tile = partial(self._tile, ops, hidden_set, weight_set)
        pieces = (
            (block, part, sums, grads, token_list.shape[0] <= size)
            for block, token_list in self._lists(start, stop, listed)
            for part in token_list.split(size)
        )
        several: _WeightProducts | None = None
        for products, token_list, weight_products in in_order(tile, pieces, self.ops.threads):
            if sums is not None:
                sums.add(products, token_list)
            if weight_products is None or several is None or weight_products.first != several.first:
                if several is not None:
                    several.add_to(grads)
                several = weight_products
            else:
                several = several.plus(weight_products)
        if several is not None:
            several.add_to(grads)

    def _tile(
        self, ops: Operands, hidden_set: int, weight_set: int, block: int, token_list: Tensor, sums, grads, whole_block
    ):
        """(products for `sums`, int32 tokens of their rows, products for `grads` or None when they are in there)."""
        saved, routing = self.saved, self.routing
        first = block * BLOCK
        weight = ops.weight(first, min(first + BLOCK, ops.vocab_size))
        two_sets = min(hidden_set, weight_set) >= 0 and hidden_set != weight_set
        count = token_list.shape[0]
        padded = padded_rows(count)
        hidden = ops.hidden_of(token_list, padded)
        rank = ops.rank(hidden)
        dz = ops.products(hidden, rank, weight, first)
        weights = torch.empty(2, count, dtype=torch.float32, device=dz.device)
        dz_hidden, hidden_tokens = dz, token_list
        if two_sets:
            dz_hidden, hidden_tokens = torch.empty_like(dz), torch.empty_like(token_list)
        second = self.sets[1] if max(hidden_set, weight_set) == 1 else None
        kept = ops.native.routed_grad(
            ops.tile(dz, count, first),
            tokens=address(token_list, torch.int32),
            labels=address(ops.tokens.labels, torch.int64),
            lse=address(saved.lse, torch.float32),
            logps=address(saved.logps, torch.float32),
            coef=address(self.upstream.coef, torch.float32),
            tau=routing.tau,
            second_tau=-1.0 if second is None else routing.second_tau,
            second_bits=0 if second is None else address(second, torch.uint8, rows=True) + block // 8,
            bitmap_stride=saved.bitmap.stride(0),
            second_bit=block % 8,
            hidden_set=hidden_set,
            weight_set=weight_set,
            row_weight=address(weights),
            dz_hidden=address(dz_hidden if two_sets else None),
            hidden_tokens=address(hidden_tokens if two_sets else None),
            num_threads=ops.threads,
        )
        dz[count:] = 0
        if two_sets:
            dz_hidden = dz_hidden[: padded_rows(kept)]
            dz_hidden[kept:] = 0
            hidden_tokens = hidden_tokens[:kept]
        weight_products = None
        if grads is not None:
            weight_products = _WeightProducts.of(grads, first, dz, hidden, rank)
            if whole_block:
                weight_products.add_to(grads)
                weight_products = None
        if sums is None or hidden_tokens.shape[0] == 0:
            return (None, None), hidden_tokens, weight_products
        return sums.products(dz_hidden, weight, first), hidden_tokens, weight_products

    def _lists(self, start: int, stop: int, which: int) -> Iterator[tuple[int, Tensor]]:
        """(block, int32 tokens) for every block with pairs of a set among tokens [start, stop), in bounded pieces."""
        ops, coef, num_tokens = self.ops, self.upstream.coef, len(self.ops.tokens)
        bits = self.sets[which]
        kept = (address(bits, torch.uint8, rows=True), bits.stride(0), address(coef, torch.float32))
        if which not in self.counts:
            self.counts[which] = torch.empty(self.num_blocks, dtype=torch.int64, device=coef.device)
            ops.native.count_pairs(*kept, num_tokens, self.num_blocks, address(self.counts[which]), ops.threads)
        counted = self.counts[which]
        counts = counted.tolist()
        limit = TILE_BYTES // 4
        first = 0
        while first < self.num_blocks:
            last, total = first, 0
            while last < self.num_blocks and (last == first or total + counts[last] <= limit):
                total += counts[last]
                last += 1
            # Room for all tokens' pairs: those of [start, stop) are a part of each block's list.
            offsets = counted.new_zeros(last - first + 1)
            torch.cumsum(counted[first:last], 0, out=offsets[1:])
            pairs = torch.empty(total, dtype=torch.int32, device=counted.device)
            ops.native.fill_pairs(
                *kept, 0, num_tokens, first, last - first, address(offsets), address(pairs), ops.threads
            )
            ends = offsets.tolist()
            for block in range(first, last):
                token_list = pairs[ends[block - first] : ends[block - first + 1]]
                if start > 0 or stop < num_tokens:
                    bounds = torch.searchsorted(token_list, token_list.new_tensor([start, stop]))
                    token_list = token_list[bounds[0] : bounds[1]]
                if token_list.shape[0]:
                    yield block, token_list
            first = last
