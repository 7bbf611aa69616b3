"""From the sums of a token's blocks to its divergence, entropy and log-probs, and to the share by which routing keeps a
block. Doubles, [tokens, blocks]: little of the time is spent here.

With the vocabulary split over ranks each of these sums its own blocks, and the ranks' sums are added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .problem import EPS, Heads


class BlockSums(NamedTuple):
    """[n, blocks], the label's id left out. u: the log ratio of the two distributions inside a block; after the second
    sweep of JSD, when log-sum-exps are known: u = log(p / m), and mean_r is what the block adds to the divergence."""

    lse: Tensor  # fp64, of either head's logits
    ref_lse: Tensor
    mean_p: Tensor  # of u under p
    var_p: Tensor
    mean_r: Tensor  # and under r
    var_r: Tensor
    entropy: Tensor  # of p inside the block


class LogSums(NamedTuple):
    """[n] fp64 of the whole vocabulary."""

    lse: Tensor
    ref_lse: Tensor
    logps: Tensor  # -inf where there is no label
    ref_logps: Tensor


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x, where nothing has no part in it."""
    return torch.where(p == 0, 0.0, p * x)


def log_sums(sums: BlockSums, label_logits: Tensor, shards=None) -> LogSums:
    """`label_logits` [2, n] of student and teacher, -inf where there is none here."""
    found = []
    for blocks, label_logit in zip((sums.lse, sums.ref_lse), label_logits):
        rest = blocks.logsumexp(1)
        if shards is not None:
            label_logit, rest = shards.label_logit(label_logit), shards.logsumexp(rest)
        label_logit = label_logit.double()
        # log p = -log(1 + exp(rest - label)) keeps the relative precision of log p near 0
        logp = -torch.logaddexp(torch.zeros_like(rest), rest - label_logit)
        found.append((torch.logaddexp(rest, label_logit), torch.where(label_logit == -torch.inf, -torch.inf, logp)))
    (lse, logps), (ref_lse, ref_logps) = found
    return LogSums(lse, ref_lse, logps, ref_logps)


def results(heads: Heads, sums: BlockSums, of: LogSums, with_entropy: bool, shards=None):
    """([n] divergence, mean that dz subtracts, entropy), None where there is none: by the chain rule, the blocks' parts
    and the label's."""
    log_p, log_r = sums.lse - of.lse[:, None], sums.ref_lse - of.ref_lse[:, None]
    p, label_p, label_r = log_p.exp(), of.logps.exp(), of.ref_logps.exp()
    parts, mean, entropy = [], None, None
    if heads.kind == "forward_kl":
        parts.append((_times(log_r.exp(), log_r - log_p - sums.mean_r), _times(label_r, of.ref_logps - of.logps)))
    elif heads.kind == "reverse_kl":
        parts.append((_times(p, log_p - log_r + sums.mean_p), _times(label_p, of.logps - of.ref_logps)))
    else:
        log_m = ((1 - heads.beta) * label_p + heads.beta * label_r).log()
        of_p, of_r = _times(label_p, of.logps - log_m), _times(label_r, of.ref_logps - log_m)
        parts.append((sums.mean_r.double(), (1 - heads.beta) * of_p + heads.beta * of_r))
        parts.append((_times(p, sums.mean_p), of_p))
    if with_entropy:
        parts.append((_times(p, sums.entropy - log_p), -_times(label_p, of.logps)))
    totals = torch.stack([blocks.sum(1) for blocks, _ in parts])
    totals = totals if shards is None else shards.sum(totals)
    values = [total + label for total, (_, label) in zip(totals, parts)]
    entropy = values.pop() if with_entropy else None
    if heads.kind != "forward_kl":
        mean = values[-1]
    return values[0], mean, entropy


def shares(heads: Heads, sums: BlockSums, of: LogSums, mean: Tensor | None, shards=None) -> tuple[Tensor, Tensor]:
    """([n] sum of the blocks' bounds of problem.py, [n, blocks] log of the share by which routing.py keeps a block)."""
    log_p, log_r = sums.lse - of.lse[:, None], sums.ref_lse - of.ref_lse[:, None]
    p, r = log_p.exp(), log_r.exp()
    outside = -mean[:, None] if heads.kind == "jsd" else log_p - log_r
    outside = outside - mean[:, None] if heads.kind == "reverse_kl" else outside
    square = _times(p, sums.var_p + (sums.mean_p + outside) ** 2)
    if heads.kind == "forward_kl":
        square = square + _times(r, sums.var_r + (sums.mean_r + outside) ** 2)
        mass = p + r
        bound = torch.minimum(mass, (mass * (square + EPS**2 * mass)).sqrt() / 2)
    else:
        bound = (p * (square + EPS**2 * p)).sqrt()
    total = bound.sum(1) if shards is None else shards.sum(bound.sum(1))
    share = torch.where(total[:, None] == 0, 0.0, bound / total[:, None])
    if heads.routes_logps:
        share = torch.maximum(share, p / -torch.expm1(of.logps)[:, None])
    return total, share.log()
