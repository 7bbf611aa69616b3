"""The CPU engine of the divergence: a tile of either head's logits at a time, folded together; ../cpu/ for two heads.

A KL divergence takes one sweep through both heads. What JSD sums over is no function of a block's sums, but needs both
log-sum-exps first: it takes so few tokens at a time that all their logits stay, and are folded twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK, num_blocks
from ..cpu.backward import gradients
from ..cpu.forward import route
from ..cpu.operands import TILE_BYTES, Operands, Space, Tile
from ..native import EXTENSION
from ..problem import Gradients, Needs, Tokens
from .blocks import BlockSums, log_sums, results, shares
from .problem import KINDS, DivergenceForward, DivergenceUpstream, Heads

BLOCK_SUMS_BYTES = 3 * TILE_BYTES  # of a chunk of tokens; the vocabulary is read once per chunk
KEPT_BYTES = 6 * TILE_BYTES  # JSD's logits of both heads
FEWEST_KEPT = 32  # tokens of a chunk: with fewer a product takes longer than two of more


def forward(
    heads: Heads,
    tokens: Tokens,
    ref_tokens: Tokens,
    *,
    stats: frozenset[str] = frozenset(),
    routing: Routing | None = None,
    shards=None,
) -> DivergenceForward:
    ops, ref_ops = Operands(heads.student, tokens), Operands(heads.teacher, ref_tokens)
    count, blocks, device = ops.count, ops.num_blocks, heads.student.hidden.device

    def empty(wanted: bool = True, dtype: torch.dtype = torch.float32, *columns: int) -> Tensor | None:
        return torch.empty(count, *columns, dtype=dtype, device=device) if wanted else None

    routed, labelled = routing is not None, heads.labelled
    bits = len(routing.taus) * -(-blocks // 8) if routed else 0
    found = DivergenceForward(
        divergence=empty(),
        lse=empty(),
        ref_lse=empty(),
        mean=empty(heads.kind != "forward_kl"),
        logps=empty(labelled),
        ref_logps=empty(labelled),
        entropy=empty("entropy" in stats),
        total=empty(routed),
        bitmap=empty(routed, torch.uint8, bits),
        most_pairs=empty(routed, torch.int32),
    )
    bytes_per_token = 8 * (blocks if shards is None else num_blocks(shards.widest)) * EXTENSION.BLOCK_DIVERGENCE_SIZE
    size = max(1, min(ops.chunk_rows(), ref_ops.chunk_rows(), BLOCK_SUMS_BYTES // bytes_per_token))
    if heads.kind == "jsd":
        kept = KEPT_BYTES // (8 * (ops.vocab_size if shards is None else shards.widest))
        size = min(size, kept) if kept >= FEWEST_KEPT else size
    for start in range(0, count, size):
        chunk = slice(start, min(start + size, count))
        of_chunk = {name: None if x is None else x[chunk] for name, x in vars(found).items()}
        _forward_chunk(heads, ops, ref_ops, chunk, of_chunk, routing, shards)
    return found


def _forward_chunk(
    heads: Heads, ops: Operands, ref_ops: Operands, chunk: slice, found: dict, routing: Routing | None, shards
) -> None:
    n, blocks, device = chunk.stop - chunk.start, ops.num_blocks, ops.head.hidden.device
    sums = torch.empty(n, blocks, EXTENSION.BLOCK_DIVERGENCE_SIZE, dtype=torch.float64, device=device)
    labels = ops.tokens.labels[chunk]
    label_logits = torch.full((2, n), -torch.inf, dtype=torch.float32, device=device)
    operands = ops.hidden_rows(chunk.start, chunk.stop), ops.low_rank(chunk.start, chunk.stop)
    ref_hidden = ref_ops.hidden_rows(chunk.start, chunk.stop)
    keeps = heads.kind == "jsd" and 8 * n * ops.vocab_size <= KEPT_BYTES
    kept: dict[int, tuple[Tile, Tile]] = {}

    def products(first: int, last: int) -> tuple[Tile, Tile]:
        where = chunk.start, chunk.stop, first, last
        spaces = (Space(), Space()) if keeps else (ops.of_tile, ref_ops.of_tile)
        return ops.products(*where, *operands, spaces[0]), ref_ops.products(*where, ref_hidden, None, spaces[1])

    def sweep(lse: Tensor | None = None, ref_lse: Tensor | None = None) -> BlockSums:
        cols = min(ops.slab_cols(n), ref_ops.slab_cols(n))
        for first in range(0, ops.vocab_size, cols):
            tile, ref_tile = kept.get(first) or products(first, min(first + cols, ops.vocab_size))
            if keeps:
                kept[first] = tile, ref_tile
            EXTENSION.divergence_fold(
                **ops.columns(tile),
                **_ref_columns(ref_ops, ref_tile),
                labels=labels,
                blocks=sums.flatten(1)[:, first // BLOCK * EXTENSION.BLOCK_DIVERGENCE_SIZE :],
                label_logit=label_logits[0],
                ref_label_logit=label_logits[1],
                lse=lse,
                ref_lse=ref_lse,
                beta=heads.beta,
                num_threads=ops.threads,
            )
        moments = sums.view(torch.float32)[..., 4:]
        return BlockSums(sums[..., 0], sums[..., 1], *moments.unbind(2)[:5])

    block_sums = sweep()
    of = log_sums(block_sums, label_logits, shards)
    if heads.kind == "jsd":
        block_sums = sweep(of.lse.contiguous(), of.ref_lse.contiguous())
    divergence, mean, entropy = results(heads, block_sums, of, found["entropy"] is not None, shards)
    total = None
    if routing is not None:
        total, log_share = shares(heads, block_sums, of, mean, shards)
        rest_lse, place = log_share.new_zeros(n), (found["bitmap"], found["most_pairs"])
        route(log_share, rest_lse, labels, routing, chunk.start, *place, shards, ops.threads)
    values = {"divergence": divergence, "mean": mean, "entropy": entropy, "total": total, **of._asdict()}
    for name, value in values.items():
        if found[name] is not None:
            found[name].copy_(value)


def _ref_columns(ref_ops: Operands, tile: Tile) -> dict:
    """The fields of csrc's RefTile."""
    return {f"ref_{name}": x for name, x in ref_ops.columns(tile).items() if name != "col_start"}


class _DivergenceDz:
    """Of the upstream gradients of the divergence, logps and entropy: a tile of the teacher's logits beside each."""

    def __init__(
        self, heads: Heads, ops: Operands, ref_ops: Operands, saved: DivergenceForward, upstream: DivergenceUpstream
    ):
        self.heads, self.ops, self.ref_ops, self.saved, self.upstream = heads, ops, ref_ops, saved, upstream
        self.coef = upstream.coef_divergence.abs() + upstream.coef.abs()
        # rows without labels have none of theirs
        self.logps = torch.full_like(saved.lse, -torch.inf) if saved.logps is None else saved.logps

    def exact(self, tile: Tile) -> None:
        start, stop = tile.first_token, tile.first_token + tile.data.shape[0]
        first, last = tile.first_column, min(tile.first_column + tile.data.shape[1], self.ops.vocab_size)
        ref_tile = self.ref_ops.products(start, stop, first, last, self.ref_ops.hidden_rows(start, stop), None)
        EXTENSION.divergence_grad(
            **self.ops.columns(tile),
            **_ref_columns(self.ref_ops, ref_tile),
            tokens=None,
            **self._fields(slice(start, stop)),
        )

    def routed(self, tile: Tile, **fields) -> None:
        ref_ops = self.ref_ops
        data = ref_ops.of_tile.take(*tile.data.shape)
        EXTENSION.routed_divergence_grad(
            **tile.fields,
            **fields,
            ref_data=ref_ops.multiply(tile._replace(data=data), None, 0).data,
            ref_bias=ref_ops.bias,
            ref_transform=ref_ops.head.transform,
            **self._fields(slice(None)),
        )

    def _fields(self, rows: slice) -> dict:
        saved, upstream, heads = self.saved, self.upstream, self.heads

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return {
            "labels": self.ops.tokens.labels[rows],
            "lse": saved.lse[rows],
            "logps": self.logps[rows],
            "coef": upstream.coef[rows],
            "entropy": of_rows(saved.entropy if upstream.coef_entropy is not None else None),
            "coef_entropy": of_rows(upstream.coef_entropy),
            "coef_lse": None,
            "ref_lse": saved.ref_lse[rows],
            "ref_logps": of_rows(saved.ref_logps),
            "mean": of_rows(saved.mean),
            "coef_divergence": upstream.coef_divergence[rows],
            "total": of_rows(saved.total),
            "kind": KINDS.index(heads.kind),
            "beta": heads.beta,
            "routes_logps": heads.routes_logps,
            "num_threads": self.ops.threads,
        }


def backward(
    heads: Heads,
    tokens: Tokens,
    ref_tokens: Tokens,
    saved: DivergenceForward,
    upstream: DivergenceUpstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    ops, ref_ops = Operands(heads.student, tokens), Operands(heads.teacher, ref_tokens)
    makes_dz = _DivergenceDz(heads, ops, ref_ops, saved, upstream)
    return gradients(ops, makes_dz, saved, routing, needs, sums)
