"""The CPU engine's backward: recompute a tile, turn it into dz, multiply twice.

    exact    tiles of many tokens by many columns
    routed   the kept pairs: rows of one block and one token each, many blocks at a time

dhidden is summed block by block in vocabulary order either way, and every sum belongs to one piece of work, so its bits
do not depend on the number of threads, as far as a library's own do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK, num_blocks
from ..native import EXTENSION
from ..problem import Forward, Gradients, Head, Needs, Tokens, Upstream
from . import library
from .operands import CPU, FLOAT32, TILE_BYTES, Operands, Space, Tile, allocate

BUFFER_BYTES = 16 << 20  # fp32 dhidden of the tokens swept together; more tokens are swept in ranges
# Above this share of live pairs the exact backward is cheaper, which packs less. Flat distributions end here.
CROSSOVER = 0.7
# Where dense products are in units for bf16, about six times as fast, and the pairs' are too, or not; not measured.
CROSSOVER_BF16, CROSSOVER_DENSE_BF16 = 0.3, 0.12


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
    """What turns tiles of the head's products into dz, in place."""

    coef: Tensor  # [N], 0 where a token has no upstream gradient

    def exact(self, tile: Tile) -> None: ...

    def routed(self, tile: Tile, **fields) -> None:
        """`fields`: those of csrc's RoutedGradArgs that are not the tokens' or the tile's."""


class _LogpsDz:
    """Of the upstream gradients of logps and entropy."""

    def __init__(self, ops: Operands, saved: Forward, upstream: Upstream):
        self.ops, self.saved, self.upstream, self.coef = ops, saved, upstream, upstream.active

    def _fields(self, rows: slice) -> dict:
        saved, upstream = self.saved, self.upstream
        given = upstream.coef_entropy is not None
        return {
            "labels": self.ops.tokens.labels[rows],
            "lse": saved.lse[rows],
            "logps": saved.logps[rows],
            "coef": upstream.coef[rows],
            "entropy": saved.entropy[rows] if given else None,
            "coef_entropy": upstream.coef_entropy[rows] if given else None,
            "coef_lse": None if upstream.coef_lse is None else upstream.coef_lse[rows],
            "num_threads": self.ops.threads,
        }

    def exact(self, tile: Tile) -> None:
        rows = slice(tile.first_token, tile.first_token + tile.data.shape[0])
        EXTENSION.grad(**self.ops.columns(tile), tokens=None, **self._fields(rows))

    def routed(self, tile: Tile, **fields) -> None:
        EXTENSION.routed_grad(**tile.fields, **fields, **self._fields(slice(None)))


def gradients(
    ops: Operands, makes_dz: MakesDz, saved, routing: Routing | None, needs: Needs, sums: Gradients | None
) -> Gradients:
    """`saved`: a forward's, of which `bitmap` and `most_pairs` are read."""
    head, tokens = ops.head, ops.tokens
    grads = Gradients() if sums is None else Gradients(sums.hidden, sums.weight)
    # the first sweep writes every row of it
    unwritten = needs.weight and grads.weight is None and ops.count > 0
    if needs.hidden and grads.hidden is None:
        grads.hidden = allocate(tokens.num_rows, ops.hidden_size, head.hidden.dtype).zero_()
    if needs.weight and grads.weight is None:
        grads.weight = allocate(*head.weight.shape, head.weight.dtype)
        if not unwritten:
            grads.weight.zero_()
    small = {"bias": head.bias, "lora_a": head.lora and head.lora.a, "lora_b": head.lora and head.lora.b}
    small = {name: like for name, like in small.items() if getattr(needs, name)}
    for name, like in small.items():
        setattr(grads, name, torch.zeros(like.shape, dtype=torch.float32, device=CPU))
    add_tiles = _Exact(ops, makes_dz)
    if routing is not None:
        # The share of pairs that live at most, whatever the draw: a decision that saw the draw would bias the mean.
        most = saved.most_pairs.masked_fill(makes_dz.coef == 0, 0).sum().item()
        crossover = CROSSOVER_BF16 if ops.pairs_in_bf16 else CROSSOVER_DENSE_BF16 if ops.in_bf16 else CROSSOVER
        if most <= crossover * max(1, ops.count * ops.num_blocks):
            add_tiles = _Routed(ops, makes_dz, saved.bitmap, routing)

    of_hidden, of_weight = needs.hidden or needs.lora_a, needs.weight or needs.bias or needs.lora_b
    count = ops.count
    size = max(1, BUFFER_BYTES // (4 * ops.hidden_size)) if of_hidden else max(count, 1)
    # Adding token ranges up in a half-precision dweight would round at every range: then dweight has its own sweep.
    joint = of_weight and (count <= size or not needs.weight or grads.weight.dtype == torch.float32)
    for start in range(0, count, size):
        of_tokens = _TokenSums(ops, grads, start, min(start + size, count)) if of_hidden else None
        add_tiles(start, min(start + size, count), of_tokens, grads if joint else None, unwritten and start == 0)
        if of_tokens is not None:
            of_tokens.finish()
    if of_weight and not joint:
        add_tiles(0, count, None, grads, unwritten)
    for name, like in small.items():
        place = None if sums is None else getattr(sums, name)
        found = getattr(grads, name)
        setattr(grads, name, found.to(like.dtype) if place is None else place.add_(found))
    return grads


class _TokenSums:
    """fp32 sums over the vocabulary for tokens [start, stop): dz @ weight and, for a low-rank head, dz @ lora_b."""

    def __init__(self, ops: Operands, grads: Gradients, start: int, stop: int):
        self.ops, self.grads, self.start, self.stop = ops, grads, start, stop
        self.dhidden = self.dlow_rank = None
        if grads.hidden is not None:
            self.dhidden = Space().take(stop - start, ops.hidden_size).zero_()
        if ops.lora_a is not None:
            rank = ops.lora_a.shape[0]
            self.dlow_rank = ops.dense(start, stop, 0, num_blocks(rank), rank, Space())
            self.dlow_rank.data.zero_()

    def add(self, tile: Tile, row_weight: Tensor | None = None) -> None:
        """dz of the tile; `row_weight`: rows of weight 0 are left out."""
        if self.dhidden is not None and tile.operands is not None:
            weight, first = tile.operands[1], tile.first_token - self.start
            dz = tile.data[:, : weight.shape[0]].to(weight.dtype)
            library.add_matmul(dz, weight.T, self.dhidden[first : first + dz.shape[0]])
        elif self.dhidden is not None:
            self._add(tile, self.dhidden, row_weight, **self.ops.weight_factor(tile))
        if self.dlow_rank is not None:
            lora_b = self.ops.lora_b
            self._add(tile, self.dlow_rank.data[:, : lora_b.shape[1]], row_weight, factor=lora_b, rounded=0)

    def _add(self, tile: Tile, out: Tensor, row_weight: Tensor | None, **factor) -> None:
        EXTENSION.add_to_tokens(
            **tile.fields,
            row_weight=row_weight,
            **{"product": FLOAT32} | factor,
            out=out,
            out_first=self.start,
            num_threads=self.ops.threads,
        )

    def finish(self) -> None:
        ops, grads = self.ops, self.grads
        if self.dlow_rank is not None:
            self.dlow_rank.data.mul_(ops.head.lora.scale)
            if self.dhidden is not None:
                self._add(self.dlow_rank, self.dhidden, None, factor=ops.lora_a, rounded=0)
            if grads.lora_a is not None:
                _add_to_columns(ops, self.dlow_rank, grads.lora_a, **ops.hidden_factor(self.dlow_rank))
        if self.dhidden is not None:
            rows = slice(self.start, self.stop) if ops.tokens.rows is None else ops.tokens.rows[self.start : self.stop]
            grads.hidden[rows] = self.dhidden.to(grads.hidden.dtype)


def _add_to_columns(
    ops: Operands,
    tile: Tile,
    out: Tensor | None,
    out_first: int = 0,
    fresh: bool = False,
    bias: Tensor | None = None,
    **factor,
) -> None:
    """dz.T @ factor into rows of `out`, which begins with column `out_first`; the sums of dz into `bias`."""
    EXTENSION.add_to_columns(
        **tile.fields,
        **{"factor_first": 0, "product": FLOAT32} | factor,
        out=out,
        out_first=out_first,
        fresh=fresh,
        bias=bias,
        num_threads=ops.threads,
    )


class _ColumnSums:
    """dz.T @ hidden, and what else columns [first, last) of the vocabulary get: of several tiles in fp32,
    rounded once. `unwritten`: nothing is in their rows of dweight yet, not even zeros."""

    def __init__(self, ops: Operands, grads: Gradients, first: int, last: int, unwritten: bool, rounds: bool):
        """`rounds`: adding one tile after the other, in the type of dweight, would round more than once."""
        self.ops, self.grads, self.first, self.last = ops, grads, first, last
        self.out, self.out_first, self.fresh = grads.weight, 0, unwritten
        self.slab, self.unwritten = None, unwritten
        if self.out is not None and (not _is_place(self.out) or (rounds and self.out.dtype != torch.float32)):
            self.slab = allocate(last - first, ops.hidden_size)
            self.out, self.out_first, self.fresh = self.slab, first, True

    def add(self, tile: Tile, low_rank: Tensor | None, low_rank_first: int) -> None:
        ops, grads, out = self.ops, self.grads, self.out
        if out is not None and tile.operands is not None:
            rows = out[self.first - self.out_first : self.last - self.out_first]
            multiply = library.matmul if self.fresh else library.add_matmul
            hidden = tile.operands[0]
            multiply(tile.data[:, : self.last - self.first].to(hidden.dtype).T, hidden.T, rows)
            out = None
        if out is not None or grads.bias is not None:
            _add_to_columns(ops, tile, out, self.out_first, self.fresh, bias=grads.bias, **ops.hidden_factor(tile))
        if grads.lora_b is not None:
            factor = {"factor": low_rank, "factor_first": low_rank_first, "source_rows": None, "rounded": 0}
            _add_to_columns(ops, tile, grads.lora_b, **factor)
        self.fresh = False

    def finish(self) -> None:
        weight = self.grads.weight
        if weight is not None and self.fresh:  # no tile was added
            self.out[self.first - self.out_first : self.last - self.out_first] = 0
        if self.slab is not None and self.unwritten:
            weight[self.first : self.last] = self.slab
        elif self.slab is not None:
            weight[self.first : self.last] += self.slab


def _is_place(x: Tensor) -> bool:
    """Whether csrc can add to it."""
    halves = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in halves and x.stride(1) == 1 and not x.is_neg() and type(x) in (Tensor, torch.nn.Parameter)


class _Exact:
    """Every column of every token."""

    def __init__(self, ops: Operands, makes_dz: MakesDz):
        self.ops, self.makes_dz = ops, makes_dz

    def __call__(
        self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None, unwritten: bool
    ) -> None:
        ops, size = self.ops, self.ops.chunk_rows()
        chunks = [(first, min(first + size, stop)) for first in range(start, stop, size)]
        low_rank = [ops.low_rank(*chunk) for chunk in chunks]
        hidden = None
        cols, several = ops.slab_cols(min(size, stop - start)), len(chunks) > 1
        rounds = several or ops.by_library(stop - start)
        for first in range(0, ops.vocab_size, cols):
            last = min(first + cols, ops.vocab_size)
            columns = None if grads is None else _ColumnSums(ops, grads, first, last, unwritten, rounds)
            for chunk, products in zip(chunks, low_rank):
                if hidden is None or several:
                    hidden = ops.hidden_rows(*chunk)
                tile = ops.products(*chunk, first, last, hidden, products)
                self.makes_dz.exact(tile)
                if sums is not None:
                    sums.add(tile)
                if columns is not None:
                    columns.add(tile, products, chunk[0])
            if columns is not None:
                columns.finish()


class _Routed:
    """The kept pairs, weighted by 1 / q: rows of one token and one block each, of as many blocks as a tile holds."""

    def __init__(self, ops: Operands, makes_dz: MakesDz, bitmap: Tensor, routing: Routing):
        self.ops, self.makes_dz, self.routing = ops, makes_dz, routing
        # [N, bytes] of the larger set, kept at the smaller tau, and of the smaller one inside it, if there is one
        self.sets = bitmap.split(-(-ops.num_blocks // 8), 1)

    def __call__(
        self, start: int, stop: int, sums: _TokenSums | None, grads: Gradients | None, unwritten: bool
    ) -> None:
        ops = self.ops
        hidden_set = -1 if sums is None else self.routing.hidden_set
        weight_set = -1 if grads is None else self.routing.weight_set
        listed = min(which for which in (hidden_set, weight_set) if which >= 0)
        low_rank = ops.low_rank(start, stop)
        for first_block, last_block, parts in self._pairs(start, stop, listed):
            columns = None
            if grads is not None:
                first, last = first_block * BLOCK, min(last_block * BLOCK, ops.vocab_size)
                columns = _ColumnSums(ops, grads, first, last, unwritten, len(parts) > 1)
            for tile in parts:
                data = ops.of_tile.take(len(tile.tokens), BLOCK)
                tile = ops.multiply(tile._replace(data=data), low_rank, start)
                of_tokens, weights = self._to_dz(tile, hidden_set, weight_set)
                if sums is not None:
                    sums.add(of_tokens, weights)
                if columns is not None:
                    columns.add(tile, low_rank, start)
            if columns is not None:
                columns.finish()

    def _to_dz(self, tile: Tile, hidden_set: int, weight_set: int) -> tuple[Tile, Tensor]:
        """(dz for dhidden, which may be another than the tile's; the weights of its rows)."""
        ops, routing = self.ops, self.routing
        two_sets = min(hidden_set, weight_set) >= 0 and hidden_set != weight_set
        second = self.sets[1] if max(hidden_set, weight_set) == 1 else None
        hidden_weight, columns_weight = torch.empty(2, len(tile.tokens), dtype=torch.float32, device=CPU)
        dz_hidden = ops.of_dz.take(*tile.data.shape) if two_sets else None
        self.makes_dz.routed(
            tile,
            bias=ops.bias,
            transform=ops.head.transform,
            tau=routing.taus[0],
            second_tau=-1.0 if second is None else routing.taus[1],
            second_bits=second,
            hidden_set=hidden_set,
            weight_set=weight_set,
            hidden_weight=hidden_weight,
            columns_weight=columns_weight,
            dz_hidden=dz_hidden,
        )
        return (tile._replace(data=dz_hidden) if two_sets else tile), hidden_weight

    def _pairs(self, start: int, stop: int, which: int) -> Iterator[tuple[int, int, list[Tile]]]:
        """(first block, last, tiles without data) for every run of blocks, of the pairs of a set among tokens [start,
        stop): one tile of several blocks, or several of one block with many pairs."""
        ops, limit = self.ops, max(1, TILE_BYTES // (4 * BLOCK))
        kept = {
            "bitmap": self.sets[which],
            "coef": self.makes_dz.coef,
            "first_token": start,
            "last_token": stop,
            "num_threads": ops.threads,
        }
        counted = torch.empty(ops.num_blocks, dtype=torch.int64, device=CPU)
        EXTENSION.count_pairs(**kept, first_block=0, num_blocks=ops.num_blocks, counts=counted)
        counts, first = counted.tolist(), 0
        while first < ops.num_blocks:
            last, total = first, 0
            while last < ops.num_blocks and (last == first or total + counts[last] <= limit):
                total += counts[last]
                last += 1
            offsets = counted.new_zeros(last - first + 1)
            torch.cumsum(counted[first:last], 0, out=offsets[1:])
            tokens = torch.empty(total, dtype=torch.int32, device=CPU)
            blocks = torch.arange(first, last, dtype=torch.int32, device=CPU)
            EXTENSION.fill_pairs(**kept, first_block=first, num_blocks=last - first, offsets=offsets, tokens=tokens)
            parts = tokens.split(limit) if total > 0 else ()
            ends = [offsets.clamp(max=len(part)) for part in parts]  # several parts are of one block
            run = first, last - first, ops.vocab_size, 0, blocks
            yield first, last, [Tile(part, *run, end, part) for part, end in zip(parts, ends)]
            first = last
