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

from ..routing import BLOCK, Routing, num_blocks
from .cpu_operands import TILE_BYTES, Operands
from .gemm import matmul, padded_rows
from .native import address
from .problem import Forward, Gradients, Head, Needs, Tokens, Upstream
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
        lora_a=torch.zeros(head.lora_a.shape, **fp32) if needs.lora_a else None,
        lora_b=torch.zeros(head.lora_b.shape, **fp32) if needs.lora_b else None,
    )
    add_tiles = _Exact(ops, saved, upstream)
    if routing is not None:
        routed = _Routed(ops, saved, upstream, routing)
        if routed.live_share <= CROSSOVER:
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
    for name, like in (("bias", head.bias), ("lora_a", head.lora_a), ("lora_b", head.lora_b)):
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
                    grads.lora_a.addmm_(part.T, ops.hidden(first, last), alpha=ops.head.lora_scale)
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
        self.counts = torch.empty(self.num_blocks, dtype=torch.int64, device=upstream.coef.device)
        ops.native.count_pairs(
            address(saved.bitmap, torch.uint8),
            saved.bitmap.stride(0),
            address(upstream.coef, torch.float32),
            len(ops.tokens),
            self.num_blocks,
            address(self.counts),
            ops.threads,
        )

    @property
    def live_share(self) -> float:
        return self.counts.sum().item() / max(1, len(self.ops.tokens) * self.num_blocks)

    def __call__(self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None) -> None:
        ops = self.ops.serial()
        # Tokens a thread works on at once, so that all threads together stay within a few tiles and kernels are few.
        size = min(1024, max(64, ops.chunk_rows() // self.ops.threads))
        pieces = (
            (block, part, sums, grads, token_list.shape[0] <= size)
            for block, token_list in self._lists(start, stop)
            for part in token_list.split(size)
        )
        several: _WeightProducts | None = None
        for products, token_list, weight_products in in_order(partial(self._tile, ops), pieces, self.ops.threads):
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

    def _tile(self, ops: Operands, block: int, token_list: Tensor, sums, grads, whole_block: bool):
        """(products for `sums`, int32 tokens of their rows, products for `grads` or None when they are in there)."""
        saved, routing = self.saved, self.routing
        first = block * BLOCK
        weight = ops.weight(first, min(first + BLOCK, ops.vocab_size))
        tau_hidden = routing.tau_hidden if sums is not None else -1.0
        tau_weight = routing.tau_weight if grads is not None else -1.0
        two_sets = sums is not None and grads is not None and tau_hidden != tau_weight
        count = token_list.shape[0]
        padded = padded_rows(count)
        hidden = ops.hidden_of(token_list, padded)
        rank = ops.rank(hidden)
        dz = ops.products(hidden, rank, weight, first)
        weights = torch.empty(2, count, dtype=torch.float32, device=dz.device)
        dz_hidden, hidden_tokens = dz, token_list
        if two_sets:
            dz_hidden, hidden_tokens = torch.empty_like(dz), torch.empty_like(token_list)
        kept = ops.native.routed_grad(
            ops.tile(dz, count, first),
            address(token_list, torch.int32),
            address(ops.tokens.labels, torch.int64),
            address(saved.lse, torch.float32),
            address(saved.logps, torch.float32),
            address(self.upstream.coef, torch.float32),
            block + ops.head.first_block,
            routing.seed,
            tau_hidden,
            tau_weight,
            address(weights),
            address(dz_hidden if two_sets else None),
            address(hidden_tokens if two_sets else None),
            ops.threads,
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

    def _lists(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(block, int32 tokens) for every block with kept pairs among tokens [start, stop), lists in bounded pieces."""
        counts = self.counts.tolist()
        limit = TILE_BYTES // 4
        first = 0
        while first < self.num_blocks:
            last, total = first, 0
            while last < self.num_blocks and (last == first or total + counts[last] <= limit):
                total += counts[last]
                last += 1
            # Room for all tokens' pairs: those of [start, stop) are a part of each block's list.
            offsets = torch.zeros(last - first + 1, dtype=torch.int64, device=self.counts.device)
            torch.cumsum(self.counts[first:last], 0, out=offsets[1:])
            pairs = torch.empty(total, dtype=torch.int32, device=self.counts.device)
            self.ops.native.fill_pairs(
                address(self.saved.bitmap, torch.uint8),
                self.saved.bitmap.stride(0),
                address(self.upstream.coef, torch.float32),
                0,
                len(self.ops.tokens),
                first,
                last - first,
                address(offsets),
                address(pairs),
                self.ops.threads,
            )
            ends = offsets.tolist()
            for block in range(first, last):
                token_list = pairs[ends[block - first] : ends[block - first + 1]]
                if start > 0 or stop < len(self.ops.tokens):
                    bounds = torch.searchsorted(token_list, token_list.new_tensor([start, stop]))
                    token_list = token_list[bounds[0] : bounds[1]]
                if token_list.shape[0]:
                    yield block, token_list
            first = last
