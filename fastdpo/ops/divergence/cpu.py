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
from ..cpu.operands import TILE_BYTES, Operands
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
    hidden, low_rank = ops.hidden(chunk.start, chunk.stop)
    ref_hidden, _ = ref_ops.hidden(chunk.start, chunk.stop)

    keeps = heads.kind == "jsd" and 8 * n * ops.vocab_size <= KEPT_BYTES
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def products(first: int, last: int) -> tuple[Tensor, Tensor]:
        tile = ops.products(hidden, low_rank, ops.weight(first, last), first)
        return tile, ref_ops.products(ref_hidden, None, ref_ops.weight(first, last), first)

    def sweep(lse: Tensor | None = None, ref_lse: Tensor | None = None) -> BlockSums:
        cols = min(ops.slab_cols(n), ref_ops.slab_cols(n))
        for first in range(0, ops.vocab_size, cols):
            tile, ref_tile = kept.get(first) or products(first, min(first + cols, ops.vocab_size))
            if keeps:
                kept[first] = tile, ref_tile
            EXTENSION.divergence_fold(
                **ops.tile(tile, first),
                **_ref_tile(ref_ops, ref_tile, first),
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


def _ref_tile(ref_ops: Operands, data: Tensor, start: int) -> dict:
    """The fields of csrc's RefTile."""
    return {f"ref_{name}": x for name, x in ref_ops.tile(data, start).items() if name != "col_start"}


class _DivergenceDz:
    """Of the upstream gradients of the divergence, logps and entropy: a tile of the teacher's logits beside each."""

    def __init__(self, heads: Heads, ref_ops: Operands, saved: DivergenceForward, upstream: DivergenceUpstream):
        self.heads, self.ref_ops, self.saved, self.upstream = heads, ref_ops, saved, upstream
        self.coef = upstream.coef_divergence.abs() + upstream.coef.abs()
        self.exact, self.routed = EXTENSION.divergence_grad, EXTENSION.routed_divergence_grad
        # rows without labels have none of theirs
        self.logps = torch.full_like(saved.lse, -torch.inf) if saved.logps is None else saved.logps

    def fields(self, ops: Operands, columns: slice, rows: slice | Tensor, num_rows: int) -> dict:
        listed, saved, upstream, heads = not isinstance(rows, slice), self.saved, self.upstream, self.heads
        ref_ops = self.ref_ops if ops.threads > 1 else self.ref_ops.serial()
        if listed:
            ref_hidden, _ = ref_ops.hidden_of(rows, num_rows)
        else:
            ref_hidden, _ = ref_ops.hidden(rows.start, rows.stop)
        tile = ref_ops.products(ref_hidden, None, ref_ops.weight(columns.start, columns.stop), columns.start)
        tile = tile[: rows.shape[0]] if listed else tile
        every = slice(None) if listed else rows

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[every]

        return {
            **_ref_tile(ref_ops, tile, columns.start),
            "labels": ops.tokens.labels[every],
            "lse": saved.lse[every],
            "logps": self.logps[every],
            "coef": upstream.coef[every],
            "entropy": of_rows(saved.entropy if upstream.coef_entropy is not None else None),
            "coef_entropy": of_rows(upstream.coef_entropy),
            "ref_lse": saved.ref_lse[every],
            "ref_logps": of_rows(saved.ref_logps),
            "mean": of_rows(saved.mean),
            "coef_divergence": upstream.coef_divergence[every],
            "total": of_rows(saved.total),
            "kind": KINDS.index(heads.kind),
            "beta": heads.beta,
            "routes_logps": heads.routes_logps,
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
    makes_dz = _DivergenceDz(heads, ref_ops, saved, upstream)
    return gradients(ops, makes_dz, saved, routing, needs, sums)
