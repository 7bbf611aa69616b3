"""The CPU engine of the divergence: a tile of either head's logits at a time, folded together; ../cpu/ for two heads.

A KL divergence takes one sweep through both heads. JSD takes two: what it sums over is no function of a block's sums,
but needs both log-sum-exps first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...head import Routing
from ...routing import BLOCK
from ..cpu.backward import gradients
from ..cpu.operands import TILE_BYTES, Operands
from ..native import EXTENSION
from ..problem import Gradients, Needs, Tokens
from .problem import KINDS, DivergenceForward, DivergenceUpstream, Heads

BLOCK_SUMS_BYTES = 3 * TILE_BYTES  # of a chunk of tokens; the vocabulary is read once per chunk


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
    bytes_per_token = 8 * blocks * EXTENSION.BLOCK_DIVERGENCE_SIZE
    size = max(1, min(ops.chunk_rows(), ref_ops.chunk_rows(), BLOCK_SUMS_BYTES // bytes_per_token))
    for start in range(0, count, size):
        _forward_chunk(heads, ops, ref_ops, slice(start, min(start + size, count)), found, routing)
    return found


def _forward_chunk(
    heads: Heads, ops: Operands, ref_ops: Operands, chunk: slice, found: DivergenceForward, routing: Routing | None
) -> None:
    n, blocks, device, threads = chunk.stop - chunk.start, ops.num_blocks, ops.head.hidden.device, ops.threads
    sums = torch.empty(n, blocks * EXTENSION.BLOCK_DIVERGENCE_SIZE, dtype=torch.float64, device=device)
    labels = ops.tokens.labels[chunk]
    label_logits = torch.full((2, n), -torch.inf, dtype=torch.float32, device=device)
    lse, ref_lse, logps, ref_logps = of_row = torch.empty(4, n, dtype=torch.float64, device=device)
    hidden, low_rank = ops.hidden(chunk.start, chunk.stop)
    ref_hidden, _ = ref_ops.hidden(chunk.start, chunk.stop)

    def sweep(known: tuple[Tensor | None, Tensor | None]) -> None:
        cols = min(ops.slab_cols(n), ref_ops.slab_cols(n))
        for first in range(0, ops.vocab_size, cols):
            last = min(first + cols, ops.vocab_size)
            tile = ops.products(hidden, low_rank, ops.weight(first, last), first)
            ref_tile = ref_ops.products(ref_hidden, None, ref_ops.weight(first, last), first)
            EXTENSION.divergence_fold(
                **ops.tile(tile, first),
                **_ref_tile(ref_ops, ref_tile, first),
                labels=labels,
                blocks=sums[:, first // BLOCK * EXTENSION.BLOCK_DIVERGENCE_SIZE :],
                label_logit=label_logits[0],
                ref_label_logit=label_logits[1],
                lse=known[0],
                ref_lse=known[1],
                beta=heads.beta,
                num_threads=threads,
            )

    given = {
        "blocks": sums,
        "num_rows": n,
        "num_blocks": blocks,
        "label_logit": label_logits[0],
        "ref_label_logit": label_logits[1],
        **{"lse": lse, "ref_lse": ref_lse, "logps": logps, "ref_logps": ref_logps},
        "kind": KINDS.index(heads.kind),
        "beta": heads.beta,
        "routes_logps": heads.routes_logps,
        "num_threads": threads,
    }
    nothing = dict.fromkeys(("divergence", "mean", "entropy", "total", "log_share"))
    sweep((None, None))
    EXTENSION.divergence_lse(**given, **nothing)
    if heads.kind == "jsd":
        sweep((lse, ref_lse))
    log_share = None if routing is None else torch.empty(n, blocks, dtype=torch.float64, device=device)
    of_chunk = {name: None if x is None else x[chunk] for name, x in vars(found).items()}
    outputs = {name: of_chunk[name] for name in ("divergence", "mean", "entropy", "total")}
    EXTENSION.divergence_finish(**given, **outputs, log_share=log_share)
    for name, value in zip(("lse", "ref_lse", "logps", "ref_logps"), of_row):
        if of_chunk[name] is not None:
            of_chunk[name].copy_(value)
    if routing is not None:
        EXTENSION.route(
            block_lse=log_share,
            rest_lse=log_share.new_zeros(n),
            labels=labels,
            first_row=chunk.start,
            tau=routing.taus[0],
            second_tau=routing.taus[1] if len(routing.taus) == 2 else -1.0,
            seed=routing.seed,
            before=None,
            sums=None,
            bitmap=of_chunk["bitmap"],
            most_pairs=of_chunk["most_pairs"],
            num_threads=threads,
        )


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
