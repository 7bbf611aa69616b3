"""The Triton engine: one tile of logits at a time in registers, fp32; nothing waits for the device.

triton_forward.py, triton_route.py, triton_lists.py, triton_routed.py and triton_backward.py hold the kernels; this
file and triton_gradients.py launch them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...routing import set_bytes
from ..problem import Forward, Head, Rows
from . import memory
from .backward import backward
from .fold import finish_kernel, fold_kernel
from .launch import launch, on_device
from .operands import Operands, Tokens, operands
from .route import route_kernel

__all__ = ["backward", "forward"]


def forward(head: Head, rows: Rows, *, stats: frozenset[str] = frozenset(), routing=None, shards=None) -> Forward:
    ops = Operands(head, rows)
    m, device = ops.num_rows, ops.device

    def column(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(m, dtype=dtype, device=device) if wanted else None

    result = Forward(
        logps=column(),
        lse=column(),
        entropy=column("entropy" in stats),
        mean_logit=column("mean_logit" in stats),
        is_top1=column("is_top1" in stats, torch.bool),
        log_sum_sq_probs=column("log_sum_sq_probs" in stats),
        # zeros where no token is, so that the same call gives the same bits
        bitmap=None
        if routing is None
        else torch.zeros(m, len(routing.taus) * set_bytes(ops.num_blocks), dtype=torch.uint8, device=device),
        most_pairs=None if routing is None else torch.zeros(m, dtype=torch.int32, device=device),
    )
    if m == 0:
        return result
    partials = (
        1 + ("entropy" in stats) + ("mean_logit" in stats) + ("log_sum_sq_probs" in stats) + 2 * ("is_top1" in stats)
    )
    capacity = min(
        memory.FORWARD_HIDDEN // (ops.pitch * ops.item_size), memory.FORWARD_PARTIAL // (4 * ops.num_blocks * partials)
    )
    capacity = min(memory.multiple(capacity, 128), triton.cdiv(m, 16) * 16)
    with on_device(device):
        tokens = ops.compact(result)
        for first in range(0, m, capacity):
            _Chunk(ops, tokens, first, capacity, stats).run(result, routing, shards)
    return result


class _Chunk:
    """Tokens [first, first + capacity)."""

    def __init__(self, ops: Operands, tokens: Tokens, first: int, capacity: int, stats: frozenset[str]):
        self.ops, self.tokens, self.first, self.capacity = ops, tokens, first, capacity

        def per_block(wanted: bool = True) -> Tensor | None:
            shape = (capacity, ops.num_blocks)
            return torch.empty(shape, dtype=torch.float32, device=ops.device) if wanted else None

        self.label_logit = torch.full((capacity,), -torch.inf, dtype=torch.float32, device=ops.device)
        self.rest_lse = torch.empty(capacity, dtype=torch.float32, device=ops.device)
        self.partials = (
            per_block(),
            per_block("entropy" in stats),
            per_block("log_sum_sq_probs" in stats),
            per_block("mean_logit" in stats),
            per_block("is_top1" in stats),
            per_block("is_top1" in stats),
        )

    def run(self, result: Forward, routing, shards) -> None:
        self._fold()
        if shards is None:
            self._finish(result, self.ops.vocab_size, None, reduce=True, emit=True)
        else:
            sums = torch.empty(6, self.capacity, dtype=torch.float32, device=self.ops.device)
            self._finish(result, shards.vocab_size, sums, reduce=True, emit=False)
            self.label_logit = shards.label_logit(self.label_logit)
            self._finish(result, shards.vocab_size, _merge(shards, sums), reduce=False, emit=True)
        if routing is not None:
            self._route(result, routing, shards)

    def _fold(self) -> None:
        ops = self.ops
        hidden = ops.gather(self.tokens, self.first, self.capacity)
        shape = ops.tile("fold")
        tma = ops.tma(hidden, ops.weight)
        a, b = operands(tma, (hidden, shape.m, shape.k), (ops.weight, shape.n, shape.k))
        tiles = triton.cdiv(self.capacity, shape.m) * triton.cdiv(ops.vocab_size, shape.n)
        programs = min(ops.target.programs * shape.per_sm, tiles)
        launch(
            fold_kernel, (programs,),
            a, b, ops.bias, ops.rank(hidden), ops.lora_b, self.tokens.labels, self.tokens.count,
            self.label_logit, *self.partials, self.first, self.capacity, ops.vocab_size, ops.hidden_size, ops.pitch,
            ops.weight.stride(0), ops.num_blocks, ops.rank_size, *ops.transform,
            **ops.variant, TMA=tma, BM=shape.m, BN=shape.n, BK=shape.k, GROUP=shape.group, PROGRAMS=programs,
            warps=shape.warps, stages=shape.stages,
        )  # fmt: skip

    def _finish(self, result: Forward, vocab_size: int, sums, *, reduce: bool, emit: bool) -> None:
        ops, tokens = self.ops, self.tokens
        shape, programs = self._rows()
        launch(
            finish_kernel, (programs,),
            *self.partials, self.label_logit, sums, tokens.rows, tokens.count, self.rest_lse,
            result.logps, result.lse, result.entropy, result.mean_logit, result.is_top1, result.log_sum_sq_probs,
            self.first, self.capacity, ops.num_blocks, vocab_size, REDUCE=reduce, EMIT=emit, **shape,
        )  # fmt: skip

    def _route(self, result: Forward, routing, shards) -> None:
        """A shard goes through its blocks once more for each set of pairs, after the ranks have exchanged the odds that
        come before theirs."""
        ops, tokens, second = self.ops, self.tokens, routing.second_tau
        shape, programs = self._rows()
        before = sums = None
        if shards is not None:
            before, sums = (torch.zeros(2, self.capacity, dtype=torch.int64, device=ops.device) for _ in range(2))
        for known in range(1 if shards is None else 2 if second is None else 3):
            if known:
                before[known - 1] = shards.sum_before(sums[known - 1])
            launch(
                route_kernel, (programs,),
                self.partials[0], self.rest_lse, tokens.labels, tokens.rows, tokens.count, routing.seed, before, sums,
                result.bitmap, result.most_pairs, self.first, self.capacity, ops.num_blocks, result.bitmap.stride(0),
                set_bytes(ops.num_blocks), routing.tau, 0.0 if second is None else second,
                TWO_SETS=second is not None, **shape,
            )  # fmt: skip

    def _rows(self) -> tuple[dict, int]:
        """(shape of the kernels that go along rows of `partials`, programs)."""
        ops, tile = self.ops, self.ops.tile("finish")
        columns = min(tile.n, max(8, triton.next_power_of_2(ops.num_blocks)))
        rows = min(self.capacity, ops.num_rows - self.first)
        return {"T": tile.m, "K": columns, "warps": tile.warps}, triton.cdiv(rows, tile.m)


def _merge(shards, sums: Tensor) -> Tensor:
    """What a token's blocks sum up to on every rank -> on all (the rows of finish_kernel's `shard`)."""
    rest, mean, lse2, total, before, after = sums
    all_rest = shards.logsumexp(rest)
    share = torch.where(rest == -torch.inf, 0.0, (rest - all_rest).exp())
    offset = torch.where(rest == -torch.inf, 0.0, rest - all_rest)
    sides = shards.max(torch.stack((before, after)))
    return torch.stack(
        (all_rest, shards.sum(share * (mean + offset)), shards.logsumexp(lse2), shards.sum(total), *sides)
    )
