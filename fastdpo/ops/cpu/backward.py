"""The CPU engine's backward: recompute a tile, turn it into dz, multiply twice.

    exact    tiles of many tokens by many columns, one after the other, every product on all threads
    routed   blocks of 128 columns by the tokens that kept them, one block per thread and no barrier between blocks

dhidden is summed block by block in vocabulary order either way, so its bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK
from ..native import EXTENSION
from ..problem import Forward, Gradients, Head, Needs, Tokens, Upstream
from .operands import TILE_BYTES, Operands, matmul, padded_rows
from .workers import in_order

PIECE = 1024  # tokens of a thread's work, at most
BUFFER_BYTES = 16 << 20  # fp32 dhidden of the tokens swept together; more tokens are swept in ranges
# Above this share of live pairs the exact backward is cheaper: gathered rows cost about 1.2 times dense ones, and it
# reads nothing twice. Flat distributions end here.
CROSSOVER = 0.7


def backward(
    head: Head,
    tokens: Tokens,
    saved: Forward,
    upstream: Upstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    ops = Operands(head, tokens)
    return gradients(ops, _LogpsDz(ops, saved, upstream), saved, routing, needs, sums)


class MakesDz(Protocol):
    """What turns tiles of the head's products into dz, in place; `fields` are csrc's of the rows it is given."""

    coef: Tensor  # [N], 0 where a token has no upstream gradient
    exact: Callable[..., None]
    routed: Callable[..., int]

    def fields(self, ops: Operands, columns: slice, rows: slice | Tensor, num_rows: int) -> dict:
        """`rows`: the tokens from one to another, or int32 tokens; `num_rows` of the products, some for padding."""


class _LogpsDz:
    """Of the upstream gradients of logps and entropy."""

    def __init__(self, ops: Operands, saved: Forward, upstream: Upstream):
        self.ops, self.saved, self.upstream, self.coef = ops, saved, upstream, upstream.coef
        self.exact, self.routed = EXTENSION.grad, EXTENSION.routed_grad

    def fields(self, ops: Operands, columns: slice, rows: slice | Tensor, num_rows: int) -> dict:
        saved, upstream = self.saved, self.upstream
        every = rows if isinstance(rows, slice) else slice(None)
        given = upstream.coef_entropy is not None
        return {
            "labels": ops.tokens.labels[every],
            "lse": saved.lse[every],
            "logps": saved.logps[every],
            "coef": upstream.coef[every],
            "entropy": saved.entropy[every] if given else None,
            "coef_entropy": upstream.coef_entropy[every] if given else None,
        }


def gradients(
    ops: Operands, makes_dz: MakesDz, saved, routing: Routing | None, needs: Needs, sums: Gradients | None
) -> Gradients:
    """`saved`: a forward's, of which `bitmap` and `most_pairs` are read."""
    head, tokens, device, fp32 = ops.head, ops.tokens, ops.head.hidden.device, torch.float32
    like_a, like_b = (None, None) if head.lora is None else head.lora[:2]
    grads = Gradients() if sums is None else replace(sums)
    if needs.hidden and grads.hidden is None:
        grads.hidden = torch.zeros(tokens.num_rows, ops.hidden_size, dtype=head.hidden.dtype, device=device)
    if needs.weight and grads.weight is None:
        grads.weight = torch.zeros(head.weight.shape, dtype=head.weight.dtype, device=device)
    if needs.bias and grads.bias is None:
        grads.bias = torch.zeros(head.bias.shape, dtype=fp32, device=device)
    if needs.lora_a and grads.lora_a is None:
        grads.lora_a = torch.zeros(like_a.shape, dtype=fp32, device=device)
    if needs.lora_b and grads.lora_b is None:
        grads.lora_b = torch.zeros(like_b.shape, dtype=fp32, device=device)
    add_tiles = _Exact(ops, makes_dz)
    if routing is not None:
        # The share of pairs that live at most, whatever the draw: a decision that saw the draw would bias the mean.
        most = saved.most_pairs.masked_fill(makes_dz.coef == 0, 0).sum().item()
        if most <= CROSSOVER * max(1, ops.count * ops.num_blocks):
            add_tiles = _Routed(ops, makes_dz, saved.bitmap, routing)

    of_hidden, of_weight = needs.hidden or needs.lora_a, needs.weight or needs.bias or needs.lora_b
    count = ops.count
    size = max(1, BUFFER_BYTES // (4 * ops.hidden_size)) if of_hidden else max(count, 1)
    # Adding token ranges up in a half-precision dweight would round at every range: then dweight has its own sweep.
    joint = of_weight and (count <= size or not needs.weight or grads.weight.dtype == torch.float32)
    for start in range(0, count, size):
        of_tokens = _TokenSums(ops, grads, start, min(start + size, count)) if of_hidden else None
        add_tiles(start, min(start + size, count), of_tokens, grads if joint else None)
        if of_tokens is not None:
            of_tokens.finish()
    if of_weight and not joint:
        add_tiles(0, count, None, grads)
    for name, like in (("bias", head.bias), ("lora_a", like_a), ("lora_b", like_b)):
        if getattr(grads, name) is not None and (sums is None or getattr(sums, name) is None):
            setattr(grads, name, getattr(grads, name).to(like.dtype))
    return grads


class _TokenSums:
    """fp32 sums over the vocabulary for tokens [start, stop): dz @ weight and, for a low-rank head, dz @ lora_b."""

    def __init__(self, ops: Operands, grads: Gradients, start: int, stop: int):
        self.ops, self.grads, self.start, self.stop = ops, grads, start, stop
        fp32 = {"dtype": torch.float32, "device": ops.head.hidden.device}
        self.dhidden = torch.zeros(stop - start, ops.hidden_size, **fp32)
        self.dlow_rank = None if ops.lora_a is None else torch.zeros(stop - start, ops.lora_a.shape[0], **fp32)

    def products(self, dz: Tensor, weight: Tensor, first: int) -> tuple[Tensor | None, Tensor | None]:
        lora_b = self.ops.lora_b
        dhidden = None if self.grads.hidden is None else matmul(dz, weight.T)
        dlow_rank = None if lora_b is None else dz @ lora_b[first : first + weight.shape[0]]
        return dhidden, dlow_rank

    def add(self, products: tuple[Tensor | None, Tensor | None], token_list: Tensor | None, start: int = 0) -> None:
        """Adds the rows of `products` to the listed int32 tokens, or to consecutive ones from `start`."""
        for target, product in zip((self.dhidden, self.dlow_rank), products):
            if product is None:
                continue
            if token_list is None:
                target[start - self.start : start - self.start + product.shape[0]] += product
                continue
            source = product[: token_list.shape[0]]
            EXTENSION.scatter_add_rows(out=target, source=source, tokens=token_list, first_token=self.start)

    def finish(self) -> None:
        ops, grads, start, stop = self.ops, self.grads, self.start, self.stop
        if self.dlow_rank is not None:
            # one core a piece: how a product of several is cut, and its sums with it, hangs on their number
            size, serial = min(PIECE, ops.chunk_rows()), ops.serial()
            pieces = ((serial, first, min(first + size, stop)) for first in range(start, stop, size))
            for product in in_order(self._through_lora_a, pieces, ops.threads):
                if product is not None:
                    grads.lora_a.add_(product, alpha=ops.head.lora.scale)
        if grads.hidden is not None:
            rows = slice(start, stop) if ops.tokens.rows is None else ops.tokens.rows[start:stop]
            grads.hidden[rows] = self.dhidden.to(grads.hidden.dtype)

    def _through_lora_a(self, ops: Operands, first: int, last: int) -> Tensor | None:
        """Adds these tokens' part of dhidden; returns their part of dlora_a, if it is wanted."""
        rows = slice(first - self.start, last - self.start)
        part = self.dlow_rank[rows]
        self.dhidden[rows].addmm_(part, ops.lora_a)
        return None if self.grads.lora_a is None else part.T @ ops.hidden(first, last)[0]


class _WeightProducts(NamedTuple):
    """What one tile adds to the rows from `first` of dweight, dbias and dlora_b."""

    first: int
    dweight: Tensor | None
    dbias: Tensor | None
    dlora_b: Tensor | None

    @staticmethod
    def of(grads: Gradients, first: int, dz: Tensor, hidden: Tensor, low_rank: Tensor | None) -> _WeightProducts:
        return _WeightProducts(
            first,
            None if grads.weight is None else matmul(dz.T, hidden.T),
            None if grads.bias is None else dz.sum(0),
            None if grads.lora_b is None else dz.T @ low_rank,
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

    def __init__(self, ops: Operands, makes_dz: MakesDz):
        self.ops, self.makes_dz = ops, makes_dz

    def __call__(self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None) -> None:
        ops, size = self.ops, self.ops.chunk_rows()
        chunks = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
        cols = ops.slab_cols(min(size, stop - start))
        hidden = low_rank = None
        for first in range(0, ops.vocab_size, cols):
            weight = ops.weight(first, min(first + cols, ops.vocab_size))
            slab = None  # summed over the chunks in fp32, rounded once
            for chunk in chunks:
                if hidden is None or len(chunks) > 1:
                    hidden, low_rank = ops.hidden(chunk.start, chunk.stop)
                dz = ops.products(hidden, low_rank, weight, first)
                self._to_dz(dz, chunk, first)
                if sums is not None:
                    sums.add(sums.products(dz, weight, first), None, chunk.start)
                if grads is not None:
                    slab = _WeightProducts.of(grads, first, dz, hidden, low_rank).plus(slab)
            if slab is not None:
                slab.add_to(grads)

    def _to_dz(self, products: Tensor, chunk: slice, first: int) -> None:
        ops, (count, columns) = self.ops, products.shape
        fields = self.makes_dz.fields(ops, slice(first, first + columns), chunk, count)
        self.makes_dz.exact(**ops.tile(products, first), tokens=None, **fields, num_threads=ops.threads)


class _Routed:
    """The kept pairs: per block gather its tokens' rows, recompute 128 columns, weight them by 1 / q.

    A block's rows of dweight are its own, so the thread that has the block writes them. dhidden crosses blocks: the
    calling thread adds up what the others return, in order; so it does for a block of more tokens than one piece.
    """

    def __init__(self, ops: Operands, makes_dz: MakesDz, bitmap: Tensor, routing: Routing):
        self.ops, self.makes_dz, self.routing = ops, makes_dz, routing
        # [N, bytes] of the larger set, kept at the smaller tau, and of the smaller one inside it, if there is one
        self.sets = bitmap.split(-(-ops.num_blocks // 8), 1)
        self.counts: dict[int, Tensor] = {}  # of each set that was listed: pairs per block

    def __call__(self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None) -> None:
        ops = self.ops.serial()
        # Tokens a thread works on at once, so that all threads together stay within a few tiles and kernels are few.
        size = min(PIECE, max(64, ops.chunk_rows() // self.ops.threads))
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
        routing, first = self.routing, block * BLOCK
        weight = ops.weight(first, min(first + BLOCK, ops.vocab_size))
        two_sets = min(hidden_set, weight_set) >= 0 and hidden_set != weight_set
        count = token_list.shape[0]
        padded = padded_rows(count)
        hidden, low_rank = ops.hidden_of(token_list, padded)
        dz = ops.products(hidden, low_rank, weight, first)
        weights = torch.empty(2, count, dtype=torch.float32, device=dz.device)
        dz_hidden, hidden_tokens = dz, token_list
        if two_sets:
            dz_hidden, hidden_tokens = torch.empty_like(dz), torch.empty_like(token_list)
        second = self.sets[1] if max(hidden_set, weight_set) == 1 else None
        columns = slice(first, first + weight.shape[0])
        kept = self.makes_dz.routed(
            **ops.tile(dz[:count], first),
            tokens=token_list,
            **self.makes_dz.fields(ops, columns, token_list, padded),
            tau=routing.taus[0],
            second_tau=-1.0 if second is None else routing.taus[1],
            second_bits=second,
            hidden_set=hidden_set,
            weight_set=weight_set,
            row_weight=weights,
            dz_hidden=dz_hidden if two_sets else None,
            hidden_tokens=hidden_tokens if two_sets else None,
            num_threads=ops.threads,
        )
        dz[count:] = 0
        if two_sets:
            dz_hidden = dz_hidden[: padded_rows(kept)]
            dz_hidden[kept:] = 0
            hidden_tokens = hidden_tokens[:kept]
        weight_products = None
        if grads is not None:
            weight_products = _WeightProducts.of(grads, first, dz, hidden, low_rank)
            if whole_block:
                weight_products.add_to(grads)
                weight_products = None
        if sums is None or hidden_tokens.shape[0] == 0:
            return (None, None), hidden_tokens, weight_products
        return sums.products(dz_hidden, weight, first), hidden_tokens, weight_products

    def _lists(self, start: int, stop: int, which: int) -> Iterator[tuple[int, Tensor]]:
        """(block, int32 tokens) for every block with pairs of a set among tokens [start, stop), in bounded pieces."""
        ops, num_blocks, num_tokens = self.ops, self.ops.num_blocks, self.ops.count
        kept = {
            "bitmap": self.sets[which],
            "coef": self.makes_dz.coef,
            "num_tokens": num_tokens,
            "num_threads": ops.threads,
        }
        if which not in self.counts:
            self.counts[which] = torch.empty(num_blocks, dtype=torch.int64, device=self.makes_dz.coef.device)
            EXTENSION.count_pairs(**kept, first_block=0, num_blocks=num_blocks, counts=self.counts[which])
        counted = self.counts[which]
        counts = counted.tolist()
        limit = TILE_BYTES // 4
        first = 0
        while first < num_blocks:
            last, total = first, 0
            while last < num_blocks and (last == first or total + counts[last] <= limit):
                total += counts[last]
                last += 1
            # Room for all tokens' pairs: those of [start, stop) are a part of each block's list.
            offsets = counted.new_zeros(last - first + 1)
            torch.cumsum(counted[first:last], 0, out=offsets[1:])
            pairs = torch.empty(total, dtype=torch.int32, device=counted.device)
            EXTENSION.fill_pairs(
                **kept,
                first_block=first,
                num_blocks=last - first,
                offsets=offsets,
                tokens=pairs,
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
