"""The CPU engine: library matrix products on tiles of logits, native folds from csrc/ between them.

A tile is at most TILE_BYTES; neither the [N, V] logits nor an fp32 copy of `hidden`, `weight` or their gradients
exists. Logits are fp32 before the log-sum-exp whatever the input type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..routing import BLOCK, Routing, num_blocks
from .gemm import matmul, padded_rows
from .problem import Forward, Gradients, Head, Needs, Tokens, Upstream

TILE_BYTES = 8 << 20  # one logits tile, one chunk of hidden, one slab of weight: about six such live at a time
BUFFER_BYTES = 32 << 20  # fp32 dhidden of the tokens swept together; more tokens are swept in ranges
# Above this share of live pairs the exact backward is cheaper: gathered rows cost about 1.2 times dense ones, and it
# reads nothing twice. Flat distributions end here.
CROSSOVER = 0.7


def _native():
    from .native import extension

    return extension()


class _Operands:
    """fp32 views or copies of rows of hidden and slabs of weight, with the low-rank head's second product."""

    def __init__(self, head: Head, tokens: Tokens):
        self.head, self.tokens = head, tokens
        self.native = _native()
        self.threads = torch.get_num_threads()
        self.hidden_size, self.vocab_size = head.hidden.shape[1], head.weight.shape[0]
        self.lora_a = self.lora_b = None
        if head.lora_a is not None:
            self.lora_a, self.lora_b = self._fp32(head.lora_a) * head.lora_scale, self._fp32(head.lora_b)
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        self._slab: tuple[int, int, Tensor] | None = None

    def _fp32(self, x: Tensor) -> Tensor:
        return x.to(self.head.compute_dtype).float()

    def chunk_rows(self, bytes_per_token: int) -> int:
        """Tokens per chunk such that hidden, and `bytes_per_token` beside it, stay within TILE_BYTES each."""
        return max(1, min(4096, TILE_BYTES // (4 * self.hidden_size), TILE_BYTES // max(bytes_per_token, 1)))

    def slab_cols(self, num_rows: int) -> int:
        """Vocabulary columns per tile, a multiple of BLOCK."""
        cols = min(TILE_BYTES // (4 * num_rows), TILE_BYTES // (4 * self.hidden_size))
        return max(BLOCK, min(cols, 16384) // BLOCK * BLOCK)

    def hidden(self, start: int, stop: int) -> Tensor:
        """[stop - start, H] fp32 rows of the tokens; a view where the input already is that."""
        if self.tokens.source_rows is None:
            return self._fp32(self.head.hidden[start:stop])
        return self.gather(None, self.tokens.source_rows[start:stop], stop - start, stop - start)

    def gather(self, token_list: Tensor | None, rows: Tensor | None, count: int, padded: int) -> Tensor:
        """fp32 rows of `hidden` named by int32 tokens and/or int64 rows, zero-padded to `padded` rows."""
        source = self.head.hidden
        out = torch.empty(padded, self.hidden_size, dtype=torch.float32)
        dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[source.dtype]
        self.native.gather_rows(
            out.data_ptr(),
            self.hidden_size,
            source.data_ptr(),
            dtype,
            source.stride(0),
            _address(token_list),
            _address(rows),
            count,
            self.hidden_size,
            self.threads,
        )
        out[count:] = 0
        return out if self.head.compute_dtype == source.dtype else self._fp32(out)

    def weight(self, start: int, stop: int) -> Tensor:
        """[stop - start, H] fp32 rows of weight, remembering the last slab that had to be converted."""
        if self.head.weight.dtype == torch.float32 and self.head.compute_dtype == torch.float32:
            return self.head.weight[start:stop]
        if self._slab is None or not (self._slab[0] <= start and stop <= self._slab[1]):
            end = min(self.vocab_size, max(stop, start + self.slab_cols(1)))
            self._slab = (start, end, self._fp32(self.head.weight[start:end]))
        return self._slab[2][start - self._slab[0] : stop - self._slab[0]]

    def products(self, hidden: Tensor, rank: Tensor | None, start: int, stop: int) -> Tensor:
        """hidden @ weight[start:stop].T, plus rank @ lora_b[start:stop].T."""
        tile = matmul(hidden, self.weight(start, stop))
        return tile if rank is None else tile.addmm_(rank, self.lora_b[start:stop].T)

    def rank(self, hidden: Tensor) -> Tensor | None:
        """lora_scale * hidden @ lora_a.T, [n, r]."""
        return None if self.lora_a is None else hidden @ self.lora_a.T

    def tile(self, data: Tensor, num_rows: int, start: int, stop: int):
        head = self.head
        bias = 0 if self.bias is None else self.bias.data_ptr() + 4 * start
        return self.native.Tile(
            data.data_ptr(),
            data.stride(0),
            num_rows,
            stop - start,
            start,
            bias,
            head.logit_scale,
            head.softcap,
            1.0 / head.temperature,
        )

    def add_rows(self, target: Tensor, product: Tensor, tile: _Tile, first_token: int) -> None:
        """target[token - first_token] += product for the tile's tokens."""
        if tile.tokens is None:
            target[tile.start - first_token : tile.start - first_token + product.shape[0]] += product
            return
        self.native.scatter_add_rows(
            target.data_ptr() - 4 * first_token * target.stride(0),
            target.stride(0),
            product.data_ptr(),
            product.stride(0),
            tile.tokens.data_ptr(),
            0,
            tile.tokens.shape[0],
            target.shape[1],
            self.threads,
        )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def forward(
    head: Head,
    tokens: Tokens,
    *,
    stats: frozenset[str] = frozenset(),
    routing: Routing | None = None,
    shards=None,
) -> Forward:
    ops = _Operands(head, tokens)
    native, threads = ops.native, ops.threads
    count, blocks = len(tokens), num_blocks(ops.vocab_size)
    out = Forward(
        logps=torch.empty(count),
        lse=torch.empty(count),
        entropy=torch.empty(count) if "entropy" in stats else None,
        mean_logit=torch.empty(count) if "mean_logit" in stats else None,
        is_top1=torch.empty(count, dtype=torch.bool) if "is_top1" in stats else None,
        log_sum_sq_probs=torch.empty(count) if "log_sum_sq_probs" in stats else None,
        bitmap=None if routing is None else torch.empty(count, -(-blocks // 8), dtype=torch.uint8),
    )
    size = ops.chunk_rows(4 * blocks)
    for start in range(0, count, size):
        stop = min(start + size, count)
        n = stop - start
        hidden = ops.hidden(start, stop)
        rank = ops.rank(hidden)
        labels = tokens.labels[start:stop]
        block_lse = torch.empty(n, blocks)
        label_logit = torch.full((n,), -torch.inf)
        row_stats = None
        if stats:
            row_stats = torch.empty(n, native.ROW_STATS_BYTES // 8, dtype=torch.float64)
            native.init_stats(row_stats.data_ptr(), n)
        cols = ops.slab_cols(n)
        for first in range(0, ops.vocab_size, cols):
            last = min(first + cols, ops.vocab_size)
            tile = ops.products(hidden, rank, first, last)
            native.fold(
                ops.tile(tile, n, first, last),
                labels.data_ptr(),
                block_lse.data_ptr() + 4 * (first // BLOCK),
                blocks,
                label_logit.data_ptr(),
                _address(row_stats),
                threads,
            )
            del tile  # before the next product allocates its own
        other_lse, vocab_size = None, ops.vocab_size
        if shards is not None:
            label_logit = shards.label_logit(label_logit)
            other_lse = shards.logsumexp_of_others(block_lse)
            row_stats = shards.merge_stats(row_stats)
            vocab_size = shards.vocab_size

        def part(x: Tensor | None, start=start, stop=stop) -> int:
            return _address(None if x is None else x[start:stop])

        native.finish(
            n,
            blocks,
            vocab_size,
            start,
            head.first_block,
            block_lse.data_ptr(),
            _address(other_lse),
            label_logit.data_ptr(),
            labels.data_ptr(),
            _address(row_stats),
            part(out.logps),
            part(out.lse),
            part(out.entropy),
            part(out.mean_logit),
            part(out.is_top1),
            part(out.log_sum_sq_probs),
            part(out.bitmap),
            0 if out.bitmap is None else out.bitmap.stride(0),
            0.0 if routing is None else routing.tau,
            0 if routing is None else routing.seed,
            threads,
        )
    return out


@dataclass
class _Tile:
    """dz of some tokens over columns [first, last), and the operands its two products need."""

    first: int
    last: int
    hidden: Tensor  # [n, H] fp32
    rank: Tensor | None  # [n, r] fp32
    dz_weight: Tensor  # [n, last - first], or fewer rows of weight's own set
    dz_hidden: Tensor  # the same tensor unless the two gradients keep different pairs
    tokens: Tensor | None  # int32 tokens of dz_hidden's rows; None: consecutive from `start`
    start: int


def backward(
    head: Head, tokens: Tokens, saved: Forward, upstream: Upstream, routing: Routing | None, needs: Needs
) -> Gradients:
    ops = _Operands(head, tokens)
    grads = Gradients(
        hidden=torch.zeros(tokens.num_rows, ops.hidden_size, dtype=head.hidden.dtype) if needs.hidden else None,
        weight=torch.zeros(head.weight.shape, dtype=head.weight.dtype) if needs.weight else None,
        bias=torch.zeros(head.bias.shape) if needs.bias else None,
        lora_a=torch.zeros(head.lora_a.shape) if needs.lora_a else None,
        lora_b=torch.zeros(head.lora_b.shape) if needs.lora_b else None,
    )
    source = None
    if routing is not None:
        source = _RoutedTiles(ops, saved, upstream, routing)
        if source.live_share > CROSSOVER:
            source = None
    if source is None:
        source = _ExactTiles(ops, saved, upstream)

    count = len(tokens)
    size = max(1, BUFFER_BYTES // (4 * ops.hidden_size)) if needs.of_hidden else max(count, 1)
    # Adding token ranges up in a half-precision dweight would round at every range: then dweight has its own sweep.
    joint = needs.of_weight and (count <= size or not needs.weight or head.weight.dtype == torch.float32)
    for start in range(0, count, size):
        stop = min(start + size, count)
        _sweep(ops, source, grads, start, stop, needs.of_hidden, joint)
    if needs.of_weight and not joint:
        _sweep(ops, source, grads, 0, count, False, True)
    for name, like in (("bias", head.bias), ("lora_a", head.lora_a), ("lora_b", head.lora_b)):
        if getattr(grads, name) is not None:
            setattr(grads, name, getattr(grads, name).to(like.dtype))
    return grads


def _sweep(ops: _Operands, source, grads: Gradients, start: int, stop: int, of_hidden: bool, of_weight: bool) -> None:
    """One pass over the vocabulary for tokens [start, stop), adding to the gradients asked for."""
    head = ops.head
    dhidden = torch.zeros(stop - start, ops.hidden_size) if of_hidden else None
    drank = torch.zeros(stop - start, ops.lora_a.shape[0]) if of_hidden and ops.lora_a is not None else None
    pending: tuple[int, int, Tensor] | None = None  # dweight rows [first, last), summed over the tiles so far

    def flush() -> None:
        if pending is not None:
            grads.weight[pending[0] : pending[1]] += pending[2]

    for tile in source.tiles(start, stop, of_hidden, of_weight):
        columns = slice(tile.first, tile.last)
        if of_hidden and tile.dz_hidden.shape[0]:
            if grads.hidden is not None:
                product = matmul(tile.dz_hidden, ops.weight(tile.first, tile.last).T)
                ops.add_rows(dhidden, product, tile, start)
            if drank is not None:
                ops.add_rows(drank, tile.dz_hidden @ ops.lora_b[columns], tile, start)
        if of_weight:
            if grads.weight is not None:
                product = matmul(tile.dz_weight.T, tile.hidden.T)
                if pending is not None and pending[0] == tile.first:
                    pending[2].add_(product)
                else:
                    flush()
                    pending = (tile.first, tile.last, product)
            if grads.bias is not None:
                grads.bias[columns] += tile.dz_weight.sum(0)
            if grads.lora_b is not None:
                grads.lora_b[columns].addmm_(tile.dz_weight.T, tile.rank)
    flush()
    if drank is not None:
        if grads.lora_a is not None:
            size = ops.chunk_rows(0)
            for first in range(start, stop, size):
                last = min(first + size, stop)
                part = drank[first - start : last - start]
                grads.lora_a.addmm_(part.T, ops.hidden(first, last), alpha=head.lora_scale)
        dhidden.addmm_(drank, ops.lora_a)
    if grads.hidden is not None and of_hidden:
        rows = slice(start, stop) if ops.tokens.rows is None else ops.tokens.rows[start:stop]
        grads.hidden[rows] = dhidden.to(grads.hidden.dtype)


class _ExactTiles:
    """Every column of every token that has an upstream gradient."""

    def __init__(self, ops: _Operands, saved: Forward, upstream: Upstream):
        self.ops, self.saved, self.upstream = ops, saved, upstream

    def tiles(self, start: int, stop: int, of_hidden: bool, of_weight: bool):
        ops, saved, upstream = self.ops, self.saved, self.upstream
        size = ops.chunk_rows(0)
        chunks = [(first, min(first + size, stop)) for first in range(start, stop, size)]
        cols = ops.slab_cols(min(size, stop - start))
        loaded = {}
        for first in range(0, ops.vocab_size, cols):
            last = min(first + cols, ops.vocab_size)
            for chunk in chunks:
                if len(chunks) > 1 or not loaded:
                    hidden = ops.hidden(*chunk)
                    loaded = {chunk: (hidden, ops.rank(hidden))}
                hidden, rank = loaded[chunk]
                dz = ops.products(hidden, rank, first, last)
                part = slice(*chunk)
                coef_entropy = entropy = 0
                if upstream.coef_entropy is not None:
                    coef_entropy, entropy = (
                        _address(upstream.coef_entropy[part]),
                        _address(saved.entropy[part]),
                    )
                ops.native.grad(
                    ops.tile(dz, dz.shape[0], first, last),
                    _address(ops.tokens.labels[part]),
                    _address(saved.lse[part]),
                    _address(saved.logps[part]),
                    _address(upstream.coef[part]),
                    entropy,
                    coef_entropy,
                    ops.threads,
                )
                yield _Tile(first, last, hidden, rank, dz, dz, None, chunk[0])


class _RoutedTiles:
    """The kept pairs, block by block: gather the tokens' rows, recompute 128 columns, weight them by 1 / q."""

    def __init__(self, ops: _Operands, saved: Forward, upstream: Upstream, routing: Routing):
        self.ops, self.saved, self.upstream, self.routing = ops, saved, upstream, routing
        self.num_blocks = num_blocks(ops.vocab_size)
        self.counts = torch.empty(self.num_blocks, dtype=torch.int64)
        ops.native.count_pairs(
            saved.bitmap.data_ptr(),
            saved.bitmap.stride(0),
            upstream.coef.data_ptr(),
            len(ops.tokens),
            self.num_blocks,
            self.counts.data_ptr(),
            ops.threads,
        )

    @property
    def live_share(self) -> float:
        return self.counts.sum().item() / max(1, len(self.ops.tokens) * self.num_blocks)

    def _lists(self, start: int, stop: int):
        """(block, int32 tokens) for every block with kept pairs among tokens [start, stop), in bounded pieces."""
        counts = self.counts.tolist()
        limit = TILE_BYTES // 4
        first = 0
        while first < self.num_blocks:
            last, total = first, 0
            while last < self.num_blocks and (last == first or total + counts[last] <= limit):
                total += counts[last]
                last += 1
            # Room for all tokens' pairs: those of [start, stop) are a part of each block's list.
            offsets = torch.zeros(last - first + 1, dtype=torch.int64)
            torch.cumsum(self.counts[first:last], 0, out=offsets[1:])
            pairs = torch.empty(total, dtype=torch.int32)
            self.ops.native.fill_pairs(
                self.saved.bitmap.data_ptr(),
                self.saved.bitmap.stride(0),
                self.upstream.coef.data_ptr(),
                0,
                len(self.ops.tokens),
                first,
                last - first,
                offsets.data_ptr(),
                pairs.data_ptr(),
                self.ops.threads,
            )
            ends = offsets.tolist()
            for block in range(first, last):
                tokens = pairs[ends[block - first] : ends[block - first + 1]]
                if start > 0 or stop < len(self.ops.tokens):
                    bounds = torch.searchsorted(tokens, torch.tensor([start, stop], dtype=torch.int32))
                    tokens = tokens[bounds[0] : bounds[1]]
                if tokens.shape[0]:
                    yield block, tokens
            first = last

    def tiles(self, start: int, stop: int, of_hidden: bool, of_weight: bool):
        ops, saved, routing = self.ops, self.saved, self.routing
        tau_hidden = routing.tau_hidden if of_hidden else -1.0
        tau_weight = routing.tau_weight if of_weight else -1.0
        two_sets = of_hidden and of_weight and tau_hidden != tau_weight
        size = ops.chunk_rows(0)
        for block, listed in self._lists(start, stop):
            first, last = block * BLOCK, min((block + 1) * BLOCK, ops.vocab_size)
            for tokens in listed.split(size):
                count = tokens.shape[0]
                padded = padded_rows(count)
                hidden = ops.gather(tokens, ops.tokens.source_rows, count, padded)
                rank = ops.rank(hidden)
                dz = ops.products(hidden, rank, first, last)
                weights = torch.empty(2, count)
                dz_hidden, hidden_tokens = dz, tokens
                if two_sets:
                    dz_hidden, hidden_tokens = torch.empty(padded, last - first), torch.empty_like(tokens)
                kept = ops.native.routed_grad(
                    ops.tile(dz, count, first, last),
                    tokens.data_ptr(),
                    ops.tokens.labels.data_ptr(),
                    saved.lse.data_ptr(),
                    saved.logps.data_ptr(),
                    self.upstream.coef.data_ptr(),
                    block + ops.head.first_block,
                    routing.seed,
                    tau_hidden,
                    tau_weight,
                    weights.data_ptr(),
                    dz_hidden.data_ptr() if two_sets else 0,
                    hidden_tokens.data_ptr() if two_sets else 0,
                    ops.threads,
                )
                dz[count:] = 0
                if two_sets:
                    dz_hidden = dz_hidden[: padded_rows(kept)]
                    dz_hidden[kept:] = 0
                    hidden_tokens = hidden_tokens[:kept]
                yield _Tile(first, last, hidden, rank, dz, dz_hidden, hidden_tokens, 0)
