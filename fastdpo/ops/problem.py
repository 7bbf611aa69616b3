"""What every engine takes and returns. Engines trust these: the public functions have validated them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..head import LogitTransform, LoRA


class TokenStats(NamedTuple):
    """Per token, 0 (False) where ignored; a statistic that was not asked for is None.

    Shaped like `labels`. Of several labels per token, ``[..., K]``, those of a label, `logps` and `is_top1`, are; the
    others are of the token's distribution, ``[...]``, and 0 where all of its labels are ignored.
    """

    logps: Tensor  # fp32, nats
    entropy: Tensor | None  # fp32, nats; differentiable
    mean_logit: Tensor | None  # fp32, mean of z over the vocabulary
    is_top1: Tensor | None  # bool, label == argmax z (first maximum, as torch.argmax)
    log_sum_sq_probs: Tensor | None  # fp32, log sum_v p[v]^2
    lse: Tensor | None = None  # fp32, nats, log sum_v exp z[v]; differentiable


STATS = TokenStats._fields[1:]
OF_LABELS = ("logps", "is_top1")  # of each of several labels; the others are of a token's distribution
FOLDED = STATS[:-1]  # what engines compute where it is asked for; lse they always do
STAT_DTYPES = {name: torch.bool if name == "is_top1" else torch.float32 for name in FOLDED}  # fp64 of fp64 inputs
IDENTITY = LogitTransform()


@dataclass(frozen=True)
class Head:
    """The logits of some rows of hidden: `transform` of hidden @ weight.T + bias."""

    # operators.py makes sure of unit stride along H, and that rows of `weight` do not overlap; the rest is contiguous.
    hidden: Tensor  # [..., H], any other strides; for engines that take tokens [*, H], rows apart
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    lora: LoRA | None = None
    transform: LogitTransform = IDENTITY
    # both operands are rounded to it (autocast); products and sums are fp32
    compute_dtype: torch.dtype = torch.float32

    def replace(self, **changes) -> Head:
        return replace(self, **changes)

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient, in the order of Needs and Gradients."""
        return self.hidden, self.weight, self.bias, *((None, None) if self.lora is None else self.lora[:2])


@dataclass(frozen=True)
class Rows:
    """All M rows of a call, ignored ones included: how many are completion tokens stays on the device."""

    labels: Tensor  # [M] int64 or int32, contiguous, ids of the whole vocabulary; [M, K] for several.py alone
    ignore_index: int
    vocab_start: int  # first id of this rank's shard
    vocab_size: int  # of all ranks

    def replace(self, **changes) -> Rows:
        return replace(self, **changes)


@dataclass(frozen=True)
class Tokens:
    """The completion tokens: ignored rows of `hidden` are not in here."""

    labels: Tensor  # [N] int64, column of `weight`; outside [0, V): on another rank's shard
    rows: Tensor | None  # [N] int64, row of the call's flat `labels` and of dhidden; None: row i is token i
    source_rows: Tensor | None  # [N] int64, row of Head.hidden, another than `rows` when the caller's is a slice
    num_rows: int  # rows of dhidden

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class Forward:
    """Per token or row, contiguous, fp32 (fp64 for fp64 inputs); None where not asked for.

    Rows: 0 (False) where ignored, NaN (False, no bits) where the label is out of range.
    """

    logps: Tensor  # [N]
    lse: Tensor  # [N]
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None  # bool
    log_sum_sq_probs: Tensor | None = None
    bitmap: Tensor | None = None  # uint8 [N, ceil(blocks / 8) of each of Routing.taus], the kept pairs
    most_pairs: Tensor | None = None  # [N] int32, kept at the smaller tau by any draw: what routed or exact hangs on
    selected: Tensor | None = None  # [N, K] the labels' logits, of several.py; then logps and is_top1 are [N, K] too


@dataclass(frozen=True)
class Upstream:
    """Gradients arriving per token or row, in the type of Forward.logps and contiguous; what ignored rows hold has no
    meaning."""

    coef: Tensor  # [N] dL/dlogp
    coef_entropy: Tensor | None = None  # [N] dL/dentropy; takes the exact path
    coef_lse: Tensor | None = None  # [N] dL/dlse

    @property
    def active(self) -> Tensor:
        """[N], not 0 where a row has a gradient of logps or lse."""
        return self.coef if self.coef_lse is None else ((self.coef != 0) | (self.coef_lse != 0)).to(self.coef.dtype)


class Needs(NamedTuple):
    """Which gradients were asked for; an engine spends nothing on the others."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False

    @property
    def of_hidden(self) -> bool:
        """dz @ weight is needed (lora_a gets its gradient through hidden @ lora_a.T)."""
        return self.hidden or self.lora_a

    @property
    def of_weight(self) -> bool:
        """dz.T @ something is needed."""
        return self.weight or self.bias or self.lora_b


@dataclass
class Gradients:
    """In the type of what they are the gradient of, rounded once; None where not asked for. Of the backward's `sums`:
    places, of any type, that the gradients are added to; of `hidden`, zeros."""

    hidden: Tensor | None = None  # [M, H], zero in ignored rows; rows: NaN where the label is out of range
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    @staticmethod
    def place(shape, like: Tensor) -> Tensor:
        """For a sum that is rounded to the type of `like` only when it is complete."""
        return torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def added_to(self, sums: Gradients | None) -> Gradients:
        for name in () if sums is None else Needs._fields[1:]:
            mine, others = getattr(self, name), getattr(sums, name)
            if others is not None and others is not mine:
                setattr(self, name, others if mine is None else others.add_(mine))
        return self


class Engine(NamedTuple):
    """What computes.

    forward(head, rows, *, stats, routing, shards) -> Forward
    backward(head, rows, saved, upstream, routing, needs, sums) -> Gradients   sums: Gradients or None
    """

    name: str
    forward: Callable[..., Forward]
    backward: Callable[..., Gradients]
