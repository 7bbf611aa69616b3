"""What every engine of the divergence takes and returns: two heads of one vocabulary, read block by block together.

    p, r = softmax of the student's logits z, of the teacher's w    x = log p - log r
    forward_kl   D = KL(r || p)                                 dz = g (p - r)
    reverse_kl   D = KL(p || r)                                 dz = g p (x - D)
    jsd          D = beta KL(r || m) + (1 - beta) KL(p || m)    dz = g (1 - beta) p (log(p / m) - KL(p || m))
                 m = (1 - beta) p + beta r

The routed backward keeps a block by a bound of what its part of dz, its sum of |dz|, can be:

    forward_kl   min(P + R, sqrt((P + R) sum (p + r) (x^2 + EPS^2)) / 2)    |p - r| = (p + r) |tanh(x / 2)|
    reverse_kl   sqrt(P sum p ((x - D)^2 + EPS^2))                          P, R: the block's probabilities
    jsd          sqrt(P sum p ((log(p / m) - KL(p || m))^2 + EPS^2))

These need no second read of the logits where moments of x inside a block are known: the chain rule splits x into the
block's log(P / R) and u, the log ratio of the two distributions inside the block. A label's id is left out of its block
and is a term of its own, so that what a confident token has beside its label keeps its relative precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ..problem import Gradients, Head

KINDS = ("forward_kl", "reverse_kl", "jsd")
DIVERGENCE_STATS = ("entropy", "logps", "ref_logps")
EPS = 2.0**-10  # nats; where x is smaller, its size is rounding of the logits: a block is kept by its probability
# Chosen as DEFAULT_TAU of head.py is: on a trained head and a perturbed, a nearly equal and a smaller one, every error
# (overall, of sure tokens, of the worst token, of dweight) of each kind stays below that of bf16 logits.
DIVERGENCE_TAU = 2.0**-9


class DivergenceOutput(NamedTuple):
    """Per token, fp32 (fp64 for fp64 inputs), nats, 0 where ignored; a statistic that was not asked for is None."""

    divergence: Tensor
    entropy: Tensor | None  # of the student; differentiable
    logps: Tensor | None  # log p(label) of the student; differentiable
    ref_logps: Tensor | None  # log r(label) of the teacher


@dataclass(frozen=True)
class Heads:
    student: Head
    teacher: Head  # without LoRA; its hidden size and types are its own
    kind: str  # of KINDS
    beta: float  # of jsd, in (0, 1)
    labelled: bool  # Rows.labels are ids; False: they say only which rows count, by 0 or ignore_index
    routes_logps: bool  # a block is kept for its part of the gradient of logps too

    def replace(self, **changes) -> Heads:
        return replace(self, **changes)


@dataclass(frozen=True)
class DivergenceForward:
    """Per token or row, contiguous, fp32 (fp64 for fp64 inputs); rows: 0 where ignored, NaN (no bits) where the label
    is out of range. The backward reads all but `divergence`."""

    divergence: Tensor  # [N]
    lse: Tensor  # [N] of the student's logits
    ref_lse: Tensor  # [N]
    mean: Tensor | None  # [N] mean under p that dz subtracts: D, KL(p || m); None for forward_kl
    logps: Tensor | None = None  # where labelled
    ref_logps: Tensor | None = None
    entropy: Tensor | None = None  # where asked for
    total: Tensor | None = None  # [N] sum of the blocks' bounds, the label's left out; routed
    bitmap: Tensor | None = None  # as in Forward
    most_pairs: Tensor | None = None


@dataclass(frozen=True)
class DivergenceUpstream:
    """Gradients arriving per token or row, as in Upstream; zeros where there is none."""

    coef_divergence: Tensor  # [N]
    coef: Tensor  # [N] of logps
    coef_entropy: Tensor | None = None  # takes the exact path


class DivergenceEngine(NamedTuple):
    """What computes.

    forward(heads, rows, *, stats, routing, shards) -> DivergenceForward      `stats`: of DIVERGENCE_STATS
    backward(heads, rows, saved, upstream, routing, needs, sums) -> Gradients of the student
    """

    name: str
    forward: Callable[..., DivergenceForward]
    backward: Callable[..., Gradients]
