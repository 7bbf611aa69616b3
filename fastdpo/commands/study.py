"""What the routed backward does to a head, for several tau: which blocks it computes, and how far its gradients are
from the exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..logps import linear_logps
from ..ops.cpu.backward import CROSSOVER
from ..routing import ONE, keep, most_pairs, num_blocks, odds, philox, shares
from .heads import Head

LOGITS = 2**24  # of them exist at once
SURE = 0.99
NEVER, SAMPLED, ALWAYS = range(3)


def named(tau: float) -> str:
    power = math.log2(tau)
    return f"2^{power:.0f}" if power == round(power) else f"{tau:.3g}"


@dataclass
class Errors:
    """Relative L2 distances from the exact gradient."""

    dhidden: float
    sure: float | None  # of the tokens whose label has a probability above SURE; None: there is none
    worst: float  # of the worst token
    dweight: float


@dataclass
class AtTau:
    tau: float
    live: Tensor  # [N] expected blocks per token
    most: int  # that any draw computes of a token
    share: float  # of all pairs that are computed
    errors: Errors | None = None

    def passes(self, frozen: bool) -> float:
        """Of policy and reference forward and the backward, where the exact backward takes three, or two."""
        return 2 + (2 if frozen else 3) * self.share

    def speed_up(self, frozen: bool) -> float:
        """By passes, over the exact step."""
        return (4 if frozen else 5) / self.passes(frozen)

    def goes_exact(self, device: str) -> bool:
        """So many blocks are live that fastdpo takes its exact path there."""
        if device == "cpu":
            return self.share > CROSSOVER
        from ..ops.triton.backward import CROSSOVER as OF_TRITON

        return self.share > OF_TRITON


@dataclass
class Study:
    head: Head
    blocks: int
    sure: Tensor  # [N] bool
    rows: list[AtTau] = field(default_factory=list)
    rounded: Errors | None = None  # of bf16 logits on the same inputs; None where inputs are not bf16
    shares: Tensor | None = None  # [n, K] of a few tokens, in order
    labels: Tensor | None = None  # [n] theirs


def _logits(head: Head, rows: slice) -> Tensor:
    """[n, V] fp32."""
    z = head.hidden[rows].float() @ head.weight.float().T
    return head.transform.applied(z if head.bias is None else z + head.bias.float())


def _chunks(head: Head) -> list[slice]:
    size = max(1, LOGITS // len(head.weight))
    return [slice(first, first + size) for first in range(0, len(head.labels), size)]


def _is_bf16(head: Head) -> bool:
    return head.hidden.dtype == head.weight.dtype == torch.bfloat16


def _upstream(head: Head) -> Tensor:
    """Of a preference loss: half of the tokens up, half down."""
    count = len(head.labels)
    return torch.where(torch.arange(count, device=head.hidden.device) < count // 2, 1.0, -1.0)


def _gradients(head: Head, **options) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight), fp32."""
    hidden, weight = (x.to(torch.float32, copy=True).requires_grad_() for x in (head.hidden, head.weight))
    bias = None if head.bias is None else head.bias.float()
    scale, softcap, temperature = head.transform
    transform = {"logit_scale": scale, "softcap": softcap or None, "temperature": temperature}
    logps = linear_logps(hidden, weight, head.labels, bias, **transform, **options)
    logps.backward(_upstream(head))
    return hidden.grad, weight.grad


def _of_rounded_logits(head: Head) -> tuple[Tensor, Tensor]:
    """As bf16 logits give them: logits and their gradient are rounded to bf16, sums are fp32."""
    dhidden, dweight = [], torch.zeros(head.weight.shape, device=head.weight.device)
    for rows in _chunks(head):
        z = head.hidden[rows] @ head.weight.T
        z = (z if head.bias is None else z + head.bias.to(z.dtype)).requires_grad_()
        logps = head.transform.applied(z).float().log_softmax(-1).gather(1, head.labels[rows, None])[:, 0]
        (dz,) = torch.autograd.grad(logps, z, _upstream(head)[rows])
        dhidden.append((dz @ head.weight).float())
        dweight += dz.T.float() @ head.hidden[rows].float()
    return torch.cat(dhidden), dweight


def _errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], sure: Tensor) -> Errors:
    def apart(x: Tensor, y: Tensor) -> float:
        return ((x - y).norm() / y.norm()).item()

    per_token = (found[0] - exact[0]).norm(dim=1) / exact[0].norm(dim=1).clamp(min=1e-30)
    of_sure = apart(found[0][sure], exact[0][sure]) if sure.any() else None
    return Errors(apart(found[0], exact[0]), of_sure, per_token.max().item(), apart(found[1], exact[1]))


def _mean(each: list[Errors]) -> Errors:
    def mean(name: str) -> float | None:
        values = [getattr(errors, name) for errors in each]
        return None if values[0] is None else sum(values) / len(values)

    return Errors(*map(mean, ("dhidden", "sure", "worst", "dweight")))


def kinds_of(share: Tensor, own: Tensor, tau: float, seed: int) -> Tensor:
    """[N, K] of NEVER computed, SAMPLED, ALWAYS computed, by the rule that the kernels follow."""
    q = odds(share, own, tau)
    return keep(q, philox(seed, torch.arange(len(share)))[:, 0]).int() + (q == ONE).int()


def steps(head: Head, taus: list[float], seeds: int) -> int:
    """That `study` announces."""
    return len(_chunks(head)) + 1 + _is_bf16(head) + len(taus) * seeds


@torch.no_grad()
def _distributions(head: Head, taus: list[float], pictured: int, announce: Callable[[str], None]) -> Study:
    count, blocks = len(head.labels), num_blocks(len(head.weight))
    shown = set(torch.linspace(0, count - 1, min(pictured, count)).long().tolist())
    live, most = {tau: [] for tau in taus}, dict.fromkeys(taus, 0)
    sure, some = [], []
    for number, rows in enumerate(_chunks(head), 1):
        announce(f"distributions, {number} of {len(_chunks(head))}")
        z = _logits(head, rows)
        sure.append(z.log_softmax(-1).gather(1, head.labels[rows, None])[:, 0] > math.log(SURE))
        share, own = shares(z, head.labels[rows])
        some += [share[i - rows.start].cpu() for i in range(rows.start, rows.start + len(z)) if i in shown]
        for tau in taus:
            q = odds(share, own, tau)
            live[tau].append((q.double() / ONE).sum(1).cpu())
            most[tau] = max(most[tau], int(most_pairs(q).max()))
    labels = head.labels[sorted(shown)].cpu()
    found = Study(head, blocks, torch.cat(sure), shares=torch.stack(some), labels=labels)
    for tau in taus:
        each = torch.cat(live[tau])
        found.rows.append(AtTau(tau, each, most[tau], each.mean().item() / blocks))
    return found


def study(
    head: Head,
    taus: list[float],
    *,
    seeds: int = 2,
    pictured: int = 40,
    announce: Callable[[str], None] = lambda _: None,
) -> Study:
    """`seeds` draws of each tau are averaged; the shares of `pictured` tokens are kept."""
    found = _distributions(head, taus, pictured, announce)
    announce("exact gradients")
    exact = _gradients(head, backward="exact")
    if _is_bf16(head):
        announce("gradients of bf16 logits")
        found.rounded = _errors(_of_rounded_logits(head), exact, found.sure)
    for row in found.rows:
        each = []
        for seed in range(seeds):
            announce(f"tau = {named(row.tau)}, draw {seed + 1}")
            each.append(_errors(_gradients(head, tau=row.tau, seed=seed), exact, found.sure))
        row.errors = _mean(each)
    return found
