"""A head that is split over ranks with tokens of their own, without ever gathering it: the tokens travel instead.

In turns of a bounded number of rows, every rank gets all ranks' hidden rows and labels, computes its shard of the
vocabulary for all of them as with `vocab_group`, and keeps its own rows of the result. In the backward hidden travels
again, upstream gradients go along, dhidden is summed at its owner, and the gradient of a shard is complete where it is:
nothing of the head crosses. Gradients are those of the sum of the ranks' losses. The handshake tells how many rows
every rank has, which the host waits for once per call.

Beside the shard, its gradient (in several turns, in fp32) and what `vocab_group`
saves for the rows of all ranks, a rank holds a handful of buffers of one turn's rows, each at most 1 / TURN of the
whole head: hidden of this turn and the next, dhidden as computed and as exchanged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..autograd import Function, once_differentiable
from ..head import HeadOptions, check_head, check_labels
from ..ops.agreement import described
from ..ops.by_token import as_rows
from ..ops.operators import Upstreams, backward, constants, prepare, sharded_forward
from ..ops.problem import STAT_DTYPES, Gradients, Needs, TokenStats
from . import handshake
from .dtensor import Plan, Resolved
from .handshake import Agreed

TURN = 32  # rows of all ranks in a turn: a fraction of the vocabulary, so that they are that fraction of the head
LARGEST_GATHERED = 2 << 30  # bytes: a larger head is not gathered, whatever the tokens
_NEXT_TURN = 0x1E3779B97F4A7C15  # added to the key: a turn's tokens are counted from 0 again


def cheaper(rows: int, vocab_size: int, hidden: Tensor, weight: Tensor, needs: Needs) -> bool:
    """Whether the tokens travel: the same answer on every rank. `rows`: those that cross, of all ranks.

    What a rank receives, a factor of (ranks - 1) / ranks * H left out:
        gathering    the head, and where it is trained its gradient             V * bytes * (1 or 2)
        travelling   hidden; in the backward hidden again, and dhidden          rows * bytes * (1 to 3)
    A shard's products are the same either way, 1 / ranks of everybody's tokens by columns or by rows.
    """
    gathered = vocab_size * weight.element_size() * (1 + needs.weight)
    travelled = rows * hidden.element_size() * (1 + (True in needs) + needs.hidden)
    return travelled <= gathered or vocab_size * weight.shape[1] * weight.element_size() > LARGEST_GATHERED


def token_stats(given: Resolved, plan: Plan, hidden, stats: tuple[str, ...]) -> TokenStats | None:
    """As the door's, of a head that `plan` would gather; None where that is cheaper. `hidden`: as the call had it."""
    dimension, vocab_size = plan.gathered[0], given.weight.shape[0]
    group = plan.group(dimension)
    options = replace(given.options, vocab_group=group)
    with handshake.announcing(group, given.hidden):
        placed = Plan.of(plan.mesh, hidden, given.weight, given.options, travelling=dimension).apply(given)
        call = check_head(placed.hidden, placed.weight, placed.labels, placed.bias, placed.lora, options)
        if options.check_labels:
            check_labels(placed.labels, options, vocab_size)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors)
    needs = Needs(*[wanted and x is not None and x.requires_grad for x in call.tensors[:5]])
    labels = call.tensors[5]
    kept = (labels != options.ignore_index).nonzero()[:, 0]
    told = described(call, options, stats, wanted, options.key(labels.device), rows=kept.shape[0])
    agreed = handshake.agree(group, told, call.tensors[0], None, call.tensors[3])
    if not cheaper(agreed.shards.size * max(agreed.rows), vocab_size, *call.tensors[:2], needs):
        return None
    outputs = super(Function, _Travelling).apply(*call.tensors, kept, options, stats, needs, call.lora_scale, agreed)
    return TokenStats(*[None if x is None else x.view(call.shape) for x in outputs])


class _Turns:
    """The rows that travel: `rows` of each rank, padded to the most of them, some at a time."""

    def __init__(self, agreed: Agreed, hidden: Tensor, kept: Tensor):
        self.shards, self.kept = agreed.shards, kept
        self.hidden, source = as_rows(hidden)
        self.source = kept if source is None else source[kept]  # row of self.hidden
        self.most = max(agreed.rows)
        self.size = max(1, self.shards.vocab_size // (TURN * self.shards.size))  # rows of one rank in a turn
        self.count = -(-self.most // self.size)

    def padded(self, values: Tensor, fill) -> Tensor:
        out = values.new_full((self.most, *values.shape[1:]), fill)
        out[: values.shape[0]] = values
        return out

    def of_all(self, values: Tensor, fill) -> Tensor:
        """[ranks, most] of everybody's [rows]."""
        padded = self.padded(values, fill)
        return self.shards._gather(padded) if self.most else padded.expand(self.shards.size, 0)

    def span(self, turn: int) -> slice:
        return slice(turn * self.size, min((turn + 1) * self.size, self.most))

    def mine(self, turn: int) -> tuple[slice, Tensor]:
        """(this rank's rows of a turn's [ranks * rows], the rows of its call they are)."""
        span = self.span(turn)
        kept, width = self.kept[span], span.stop - span.start
        start = self.shards.rank * width
        return slice(start, start + kept.shape[0]), kept

    def __iter__(self):
        """(turn, hidden of all ranks [ranks * rows, H]); the next turn's is under way meanwhile."""
        following = self._start(0) if self.count else None
        for turn in range(self.count):
            work, hidden, _ = following
            work.wait()
            following = self._start(turn + 1) if turn + 1 < self.count else None
            yield turn, hidden

    def _start(self, turn: int):
        import torch.distributed as dist

        span = self.span(turn)
        rows, width = self.source[span], span.stop - span.start
        mine = self.hidden.new_zeros(width, self.hidden.shape[1])
        mine[: rows.shape[0]] = self.hidden[rows]
        hidden = mine.new_empty(self.shards.size, *mine.shape)
        work = dist.all_gather(list(hidden.unbind(0)), mine, group=self.shards.group, async_op=True)
        return work, hidden.view(-1, mine.shape[1]), mine  # kept until it has been sent

    def to_owners(self, dhidden: Tensor) -> Tensor:
        """[ranks * rows, H] of every rank -> their sum over ranks, of this rank's rows, in rank order."""
        import torch.distributed as dist

        received = torch.empty_like(dhidden)
        dist.all_to_all_single(received, dhidden, group=self.shards.group)
        return received.view(self.shards.size, -1, dhidden.shape[1]).sum(0)


def _key(key: Tensor | None, turn: int) -> Tensor | None:
    if key is None:
        return None
    past = turn * _NEXT_TURN % 2**64
    return key + (past - 2**64 if past >= 2**63 else past)  # wraps


class _Travelling(Function):
    """As LinearLogpsFunction, of tokens that are each rank's own; `kept`: this rank's rows with a label."""

    of = "fastdpo.linear_logps"

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, labels, kept, options: HeadOptions, stats, needs, lora_scale, agreed
    ):
        ctx.set_materialize_grads(False)
        head = (weight, bias, lora_a, lora_b)
        key, scalars = prepare(options, needs, agreed.key, hidden, weight, lora_scale)
        turns = _Turns(agreed, hidden, kept)
        all_labels = turns.of_all(labels[kept].long(), options.ignore_index)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        outputs = {}
        for name in ("logps", *stats):
            dtype = torch.bool if STAT_DTYPES.get(name) == torch.bool else wide
            outputs[name] = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
        saved = []
        for turn, rows in turns:
            tensors = (rows, *head, all_labels[:, turns.span(turn)].reshape(-1))
            result = sharded_forward(tensors, _key(key, turn), scalars, stats, agreed)
            mine, into = turns.mine(turn)
            for name, values in outputs.items():
                values[into] = getattr(result, name)[mine]
            saved += [result.logps, result.lse, result.entropy, result.bitmap, result.most_pairs, result.selected]
        if True in needs:
            ctx.save_for_backward(hidden, *head, kept, all_labels, *saved)
            ctx.needs, ctx.scalars, ctx.agreed = needs, scalars, agreed
        results = tuple(outputs.get(name) for name in TokenStats._fields)
        ctx.mark_non_differentiable(*constants(results))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        upstream = Upstreams.of(upstream)
        if upstream.first is None:
            return (None,) * 12
        shards, needs, scalars = ctx.agreed.shards, ctx.needs, ctx.scalars
        with handshake.announcing(shards.group, upstream.first, "the backward"):
            hidden, weight, bias, lora_a, lora_b, kept, all_labels, *saved = ctx.saved_tensors
        upstream = handshake.agree_upstream(shards, *upstream, own=True)
        with handshake.telling(shards.group):
            turns = _Turns(ctx.agreed, hidden, kept)
            head = (weight, bias, lora_a, lora_b)
            sums = Gradients()  # over turns and ranks, rounded once
            for name, x in zip(Needs._fields[1:], head):
                if getattr(needs, name) and (turns.count > 1 or name == "lora_a"):
                    setattr(sums, name, Gradients.place(x.shape, x))
            upstream = [None if x is None else turns.of_all(x[kept], 0.0) for x in upstream]
            dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            for turn, rows in turns:
                span = turns.span(turn)
                coefs = Upstreams(*[None if x is None else x[:, span].reshape(-1) for x in upstream])
                tensors = (rows, *head, all_labels[:, span].reshape(-1), *saved[6 * turn : 6 * turn + 6])
                sums.hidden = Gradients.place(rows.shape, rows) if needs.hidden else None
                sums = backward(tensors, coefs, scalars, needs, shards, sums)
                if needs.hidden:
                    _, into = turns.mine(turn)
                    mine = turns.to_owners(sums.hidden)[: into.shape[0]]
                    dhidden.view(-1, hidden.shape[-1])[into] = mine.to(hidden.dtype)
            if needs.lora_a:
                sums.lora_a = shards.sum(sums.lora_a)

        def like(name: str, x: Tensor | None) -> Tensor | None:
            if not getattr(needs, name):
                return None
            value = getattr(sums, name)
            return torch.zeros_like(x) if value is None else value.to(x.dtype)  # no rank has a token

        gradients = [like(name, x) for name, x in zip(Needs._fields[1:], (weight, bias, lora_a, lora_b))]
        return dhidden if needs.hidden else None, *gradients, *(None,) * 7
