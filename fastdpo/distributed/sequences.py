"""Sequence shards: every rank of a group holds a part of the tokens of each of the 2B sequences (context and sequence
parallelism); what crosses ranks is a few numbers per sequence, and small integers per token where their order is asked
for.

    sum over a sequence = sum over ranks, in rank order, of the sums over their tokens: the same bits on every rank

The backward crosses nothing: each rank's tokens get the gradient of the sum that they are in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..autograd import Function, once_differentiable
from ..sequences import Sequences, cast, wide_dtype
from ..tensors import plain, traced
from .groups import gather

GRADIENTS = ("sum", "mean")
SAME = 1e-3  # what must be the same on every rank may differ by so much, as sums in another order do; rank 0's is taken
POSITIONS = 2**32  # more than any sequence has
NO_TOKEN = 2**63 - 1
_AGREED: WeakKeyDictionary = WeakKeyDictionary()  # of a group: the tickets that its ranks were seen to share
_MOST_AGREED = 1000  # a beta that changes at every step must not fill the memory


def digest(described: dict[str, object]) -> int:
    """64 bits, the same in every process for the same plain values."""
    text = repr(sorted(described.items())).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def agree(group, device, described: dict[str, object], error: Exception | None = None, name="seq_group") -> None:
    """The handshake: returns where all ranks of `group` described the same plain values; raises one ValueError on all
    where they did not, naming the first difference, or what one of them failed of. A rank that failed gives its
    `error`, and returns: it has that to raise.

    One exchange of fixed size, compared by the host: at every call on the CPU; on other devices, where reading waits,
    only for values that the group has not agreed on before, and errors only until its first agreement.
    """
    import torch.distributed as dist

    mine, agreed = digest(described), _AGREED.setdefault(group, set())
    if device.type != "cpu" and (mine in agreed if error is None else agreed):
        return
    ticket = torch.tensor([mine, error is not None], device=device)
    tickets = gather(group, ticket).tolist()
    if all(other == [mine, 0] for other in tickets):
        if len(agreed) >= _MOST_AGREED:
            agreed.clear()  # on all ranks at once
        agreed.add(mine)
        return
    told = [None] * len(tickets)
    cause = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, (described, cause), group=group)
    if error is None:
        raise ValueError(_disagreement(name, told))


def _disagreement(name: str, told: list[tuple[dict, str | None]]) -> str:
    for rank, (_, cause) in enumerate(told):
        if cause is not None:
            return f"rank {rank} of {name} failed: {cause}"
    for key in dict.fromkeys(key for described, _ in told for key in described):
        values = [described.get(key) for described, _ in told]
        if any(repr(value) != repr(values[0]) for value in values):
            shown = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
            return f"the ranks of {name} must agree on {key}; got {shown}"
    raise AssertionError("tickets differ, what they describe does not")


@contextmanager
def agreement(group, like) -> Iterator[dict[str, object]]:
    """Around what a rank does by itself, which describes itself in the dict that this gives: ranks agree at the end, or
    hear of a rank that raised."""
    tensor = isinstance(like, Tensor) and not like.is_meta
    device, described = like.device if tensor else torch.device("cpu"), {}
    try:
        if traced(like if isinstance(like, Tensor) else None):
            raise NotImplementedError("seq_group talks to other processes: it takes no fake or meta tensors")
        yield described
    except Exception as error:
        agree(group, device, described, error)
        raise
    agree(group, device, described)


@dataclass(frozen=True)
class SequenceGroup:
    """This rank's place among those that share the tokens of every sequence, and how gradients are counted."""

    group: object
    rank: int
    size: int
    factor: int  # of gradients: the size where what averages them follows
    ticket: int = 0  # digest of what this call's ranks agreed on

    @staticmethod
    def of(group, grads: str) -> SequenceGroup:
        import torch.distributed as dist

        size = dist.get_world_size(group)
        return SequenceGroup(group, dist.get_rank(group), size, size if grads == "mean" else 1)

    def of_call(self, described: dict[str, object]) -> SequenceGroup:
        return replace(self, ticket=digest(described))

    def gather(self, x: Tensor) -> Tensor:
        return gather(self.group, x)

    def sum(self, local: Tensor) -> Tensor:
        """Of all ranks, the same bits on each. Where a handshake was left out and tickets differ after all, NaN."""
        return _Sum.apply(local, self)

    def same(self, name: str, x: Tensor) -> Tensor:
        """`x`, whole on every rank: rank 0's, the same bits on each. ValueError on all where another's is not the same;
        where reading waits, NaN. Each rank gets its part of the gradient, as parameters do."""
        return _Same.apply(x, name, self)


class _Sum(Function):
    of = "fastdpo.linear_dpo_loss"

    @staticmethod
    def forward(ctx, local, over):
        ctx.factor = over.factor
        # the ticket in words that fp32 holds too
        words = [over.ticket >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
        words = torch.tensor(words, dtype=local.dtype, device="cpu").to(local.device)
        told = over.gather(torch.cat([words, local.reshape(-1)]))
        together = (told[:, :4] == told[0, :4]).all()
        return torch.where(together, told[:, 4:].sum(0), torch.nan).view(local.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy * ctx.factor, None


class _Same(Function):
    of = "fastdpo.linear_dpo_loss"

    @staticmethod
    def forward(ctx, x, name, over):
        ctx.part = over.factor / over.size
        told = over.gather(x)
        close = torch.isclose(told, told[0], rtol=SAME, atol=SAME, equal_nan=True)
        if x.device.type == "cpu" and not close.all():
            rank, *place = (~close).nonzero()[0].tolist()
            raise ValueError(
                f"{name} must be the same on every rank of seq_group, whole and not each rank's part; got "
                f"{told[0][tuple(place)].item():g} on rank 0 and {told[rank][tuple(place)].item():g} on rank {rank}"
            )
        return torch.where(close.all(0), told[0], torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy * ctx.part, None, None


def check_gradients(group, grads) -> None:
    if grads not in GRADIENTS:
        raise ValueError(f"seq_grads must be 'sum' or 'mean'; got {grads!r}")
    if group is None and grads != "sum":
        raise ValueError(f"seq_grads={grads!r} has no effect without seq_group")


def described_options(options) -> dict[str, object]:
    """Of a dataclass of options, as `agree` takes them: tensors are compared where they are used."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: "a tensor" if isinstance(x, Tensor) else x for name, x in values.items()}


def described_tensors(tensors: dict[str, Tensor | None], shape: bool = True) -> dict[str, object]:
    """Types, shapes and whether a gradient is wanted, as `agree` takes them."""
    described = {}
    for name, x in tensors.items():
        described[f"the dtype of {name}"] = None if x is None else str(x.dtype)
        if shape and x is not None:
            described[f"the shape of {name}"] = tuple(x.shape)
        if x is not None and x.is_floating_point():
            described[f"whether {name} requires a gradient"] = torch.is_grad_enabled() and x.requires_grad
    return described


def check_positions(positions, labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None, read: bool):
    """ "zigzag" or a plain tensor of positions; ValueError or TypeError naming the argument. Of offsets values
    are read on the CPU, or with `read`, which waits; those of positions always."""
    if isinstance(positions, str):
        if positions != "zigzag":
            raise ValueError(f"seq_positions must be None, 'zigzag' or a tensor of positions; got {positions!r}")
        if cu_seqlens is None:
            lengths = [labels.shape[1]]
        else:
            lengths = cu_seqlens.diff().tolist() if read or cu_seqlens.device.type == "cpu" else []
        for length in lengths:
            if length % 2:
                raise ValueError(
                    "with seq_positions='zigzag' a rank holds two equal chunks of every sequence, but the tokens here "
                    f"are {length}, an odd number"
                )
        return positions
    positions = plain("seq_positions", positions)
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"seq_positions must be int64 or int32; got {positions.dtype}")
    if positions.shape != labels.shape:
        raise ValueError(
            f"seq_positions must be shaped like labels, {tuple(labels.shape)}; got {tuple(positions.shape)}"
        )
    if positions.device != labels.device:
        raise ValueError(f"seq_positions is on {positions.device} but labels is on {labels.device}")
    wrong = positions[(labels != ignore_index) & ((positions < 0) | (positions.long() >= POSITIONS))]
    if wrong.numel():
        raise ValueError(f"seq_positions of completion tokens must lie in [0, 2**32); got {int(wrong[0])}")
    return positions.long()


class SequenceShards(Sequences):
    """Sequences of which each rank holds some tokens: `labels` and what is per token are this rank's; counts and sums
    are whole, the same on every rank."""

    def __init__(
        self,
        labels: Tensor,
        ignore_index: int,
        cu_seqlens: Tensor | None,
        over: SequenceGroup,
        positions: Tensor | str | None = None,  # how tokens of different ranks follow each other: check_positions
    ):
        super().__init__(labels, ignore_index, cu_seqlens)
        self.over, self.positions = over, positions
        self.by_rank = over.gather(self.counts)  # [size, 2B]
        self.counts = self.by_rank.sum(0)
        self.fault = None  # 0-d bool: what only the device knows to be wrong, and shows as NaN

    def sums(self, *per_token: Tensor) -> Tensor:
        local = super().sums(*per_token)
        if self.fault is not None:
            local = local.masked_fill(self.fault, torch.nan)
        return self.over.sum(local)

    def whole(self, name: str, per_sequence: Tensor) -> Tensor:
        return self.over.same(name, per_sequence)

    def places(self) -> Tensor:
        if self.positions is None:
            return super().places() + self.by_rank[: self.over.rank].sum(0)[self.owners()]
        return self._zigzag_places() if isinstance(self.positions, str) else self._places_by_position()

    def _zigzag_places(self) -> Tensor:
        """Rank r holds chunk r and, after it, chunk 2 * size - 1 - r."""
        owners, rank = self.owners(), self.over.rank
        if self.offsets is None:
            second = torch.arange(self.mask.shape[1], device=self.mask.device) >= self.mask.shape[1] // 2
        else:
            lengths = self.offsets.diff()
            self.fault = (lengths % 2 != 0).any()
            tokens = torch.arange(self.mask.shape[0], device=self.mask.device)
            second = tokens - self.offsets[:-1][owners] >= lengths[owners] // 2
        chunks = self.over.gather(torch.stack([self.count(self.mask & ~second), self.count(self.mask & second)]))
        before_first = chunks[:rank, 0].sum(0)
        before_second = chunks[:, 0].sum(0) + chunks[rank + 1 :, 1].sum(0) - chunks[rank, 0]
        return super().places() + torch.where(second, before_second[owners], before_first[owners])

    def _places_by_position(self) -> Tensor:
        """One integer per token crosses: its sequence and its position there."""
        first = (self.owners() * POSITIONS).expand(self.mask.shape).contiguous()
        keys = torch.where(self.mask, first + self.positions, NO_TOKEN).reshape(-1)
        ordered = self._all_ranks(keys).sort().values
        twice = ordered[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != NO_TOKEN)]
        if twice.numel():
            sequence, position = divmod(int(twice[0]), POSITIONS)
            raise ValueError(
                f"seq_positions must say each token's place in its whole sequence; got {position} twice in sequence "
                f"{sequence}, over all ranks of seq_group"
            )
        places = torch.searchsorted(ordered, keys, right=True) - torch.searchsorted(ordered, first.reshape(-1))
        return places.view(self.mask.shape)

    def _all_ranks(self, keys: Tensor) -> Tensor:
        """Of ranks with different numbers of tokens, which the host reads."""
        most = int(self.over.gather(torch.tensor([keys.numel()], device=keys.device)).max())
        return self.over.gather(torch.cat([keys, keys.new_full((most - keys.numel(),), NO_TOKEN)])).reshape(-1)


def sum_of_parts(over: SequenceGroup, logps: list[Tensor | None], lengths: list[Tensor | None]):
    """Of log-probs (or divergences) and lengths per sequence, each rank's part: both lists whole, fp64 and int64."""
    given = [x for x in (*logps, *lengths) if x is not None]
    wide = wide_dtype(given[0].device)
    sums = iter(over.sum(torch.stack([cast(x, wide) if x.is_floating_point() else x.to(wide) for x in given])))
    logps = [None if x is None else next(sums) for x in logps]
    return logps, [None if x is None else next(sums).nan_to_num(0.0).long() for x in lengths]
