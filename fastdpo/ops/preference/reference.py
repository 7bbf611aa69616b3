"""Every preference loss in plain torch, differentiated by autograd: the oracle of csrc/shared/preference_losses.h, and
the engine where that cannot run. Computed in fp64; same names as there:
    a, b = chosen, rejected log-ratio    s = f-divergence score    d = s_w - s_l    n = completion tokens
    k = KL(reference || policy), summed over a completion
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...distributed.sequences import SequenceGroup, SequenceShards, sum_of_parts
from ...losses import PreferenceOptions
from ...sequences import Cast, Sequences, cast, wide_dtype

MAX_EXPONENT = 80.0  # TRL's bound: e^80 is a finite float
# A mean log-prob of 0 says only that p rounds to 1, where the log-odds have a pole: it counts as that of the largest
# probability below 1 that fp32 holds. So does all above -2^-126, where their slope would leave fp32.
CERTAIN_LOGP = -(2.0**-24)
MAX_MEAN_LOGP = -(2.0**-126)


class BatchInputs(NamedTuple):
    """What the losses of a batch are computed from: tensors that a door has checked. Lengths go with `rejected`, the
    rest with tokens."""

    logps: Tensor  # [2B, T] or packed [N], the B chosen sequences first; or [B] of the chosen sequences
    rejected: Tensor | None = None  # [B] beside those
    ref: Tensor | None = None  # like `logps`; or one number per sequence of the tokens, [2B], packed [2B, 1]
    ref_rejected: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    kl: Tensor | None = None  # KL(reference || policy), like `logps`
    kl_rejected: Tensor | None = None
    labels: Tensor | None = None
    cu_seqlens: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None  # per token; asks for WPO's weights
    ignore_index: int = -100
    average: bool = False
    ld_alpha: float | None = None
    over: SequenceGroup | None = None  # whose ranks hold the rest of the tokens, or of the sums
    positions: Tensor | str | None = None  # how their tokens follow each other, where ld_alpha asks

    def sequences(self) -> Sequences:
        where = (self.labels, self.ignore_index, self.cu_seqlens)
        return Sequences(*where) if self.over is None else SequenceShards(*where, self.over, self.positions)


@dataclass(frozen=True)
class Terms:
    """Sequence log-probs, all [B] and fp64, and what the formulas are written in."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | float
    ref_rejected: Tensor | float
    k_w: Tensor | float
    k_l: Tensor | float
    n_w: Tensor | None  # at least 1
    n_l: Tensor | None
    sft_logps: Tensor  # sums over the chosen tokens
    sft_tokens: Tensor | None  # [B], zeros included
    options: PreferenceOptions

    @property
    def a(self):
        return self.chosen - self.ref_chosen

    @property
    def b(self):
        return self.rejected - self.ref_rejected

    @property
    def s_w(self):
        return score(self.a, self.options)

    @property
    def s_l(self):
        return score(self.b, self.options)

    @property
    def x(self):
        """beta d"""
        return self.options.beta * (self.s_w - self.s_l)


def sigmoid(x: Tensor) -> Tensor:
    return logsigmoid(x).exp()  # torch.sigmoid's backward takes 1 - y, which is 0 from x = 37 on


def expm1(x: Tensor) -> Tensor:
    return torch.where(x < -0.5, x.exp() - 1, torch.expm1(x))  # torch.expm1's backward takes y + 1, 0 below x = -37


def score(logratio: Tensor, options: PreferenceOptions) -> Tensor:
    """f'(t) at log t; f-DPO, arXiv 2309.16240."""
    kind = options.f_divergence_type
    if kind == "forward_kl":
        return -expm1((-logratio).clamp(max=MAX_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(logratio)
    power = options.f_alpha_divergence_coef - 1
    if kind == "alpha_divergence" and power != 0:
        return expm1((power * logratio).clamp(max=MAX_EXPONENT)) / power
    return logratio


def smoothed(x: Tensor, options: PreferenceOptions) -> Tensor:
    e = options.label_smoothing
    if e == 0:  # 0 * log S(-inf) would be NaN
        return -logsigmoid(x)
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)


def robust(q: Terms) -> Tensor:
    e = q.options.label_smoothing
    if e == 0:
        return -logsigmoid(q.x)
    return (-(1 - e) * logsigmoid(q.x) + e * logsigmoid(-q.x)) / (1 - 2 * e)


def exo_pair(q: Terms) -> Tensor:
    e = q.options.label_smoothing
    return sigmoid(q.x) * (logsigmoid(q.x) - math.log1p(-e)) + sigmoid(-q.x) * (logsigmoid(-q.x) - math.log(e))


def sppo_hard(q: Terms) -> Tensor:
    half = 0.5 / q.options.beta
    return (q.a - half) ** 2 + (q.b + half) ** 2


def unsort(ranked: Tensor, like: Tensor) -> Tensor:
    """Row k of `ranked` goes where the k-th smallest of `like` is."""
    return torch.empty_like(ranked).index_copy(0, like.argsort(stable=True), ranked)


def aot(q: Terms) -> Tensor:
    policy = q.chosen - q.rejected
    reference = torch.zeros_like(policy) + q.ref_chosen - q.ref_rejected
    ranked = policy.sort(stable=True).values - reference.sort(stable=True).values
    return smoothed(q.options.beta * unsort(ranked, policy), q.options)


def aot_unpaired(q: Terms) -> Tensor:
    ranked = q.a.sort(stable=True).values - q.b.sort(stable=True).values
    return smoothed(q.options.beta * unsort(ranked, q.a), q.options)


def discopop(q: Terms) -> Tensor:
    z = q.x / q.options.discopop_tau
    # e^-x and S(z) overflow and vanish together: their exponents are added before either exists.
    exponential = (logsigmoid(z) - q.x).clamp(max=MAX_EXPONENT).exp()
    return -logsigmoid(q.x) * sigmoid(-z) + exponential


def sft(logps: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the batch's chosen tokens, one number for every row; 0 without tokens."""
    return (-logps.sum() / tokens.sum().clamp(min=1)).expand_as(logps)


def log_odds(mean_logp: Tensor) -> Tensor:
    certain = mean_logp > MAX_MEAN_LOGP
    x = torch.where(certain, mean_logp - mean_logp.detach() + CERTAIN_LOGP, mean_logp)
    return x - (-torch.expm1(x)).log()


def kto(q: Terms) -> Tensor:
    o = q.options
    desirable = sigmoid(-o.beta * (q.a - o.kto_kl))
    undesirable = sigmoid(o.beta * (q.b - o.kto_kl))
    return 0.5 * (o.desirable_weight * desirable + o.undesirable_weight * undesirable)


def dpop(q: Terms) -> Tensor:
    return -logsigmoid(q.options.beta * (q.a - q.b - q.options.dpop_lambda * (-q.a).relu()))


REFERENCE = {
    "sigmoid": lambda q: smoothed(q.x, q.options),
    "robust": robust,
    "ipo": lambda q: (q.s_w / q.n_w - q.s_l / q.n_l - 0.5 / q.options.beta) ** 2,
    "hinge": lambda q: (1 - q.x).relu(),
    "exo_pair": exo_pair,
    "nca_pair": lambda q: (
        -logsigmoid(q.options.beta * q.a)
        - 0.5 * logsigmoid(-q.options.beta * q.a)
        - 0.5 * logsigmoid(-q.options.beta * q.b)
    ),
    "bco_pair": lambda q: -logsigmoid(q.options.beta * q.a) - logsigmoid(-q.options.beta * q.b),
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": lambda q: sigmoid(-q.options.beta * q.a) + sigmoid(q.options.beta * q.b),
    "apo_down": lambda q: sigmoid(q.options.beta * q.a) + sigmoid(-q.options.beta * (q.a - q.b)),
    "discopop": discopop,
    "sigmoid_norm": lambda q: -logsigmoid(q.options.beta * (q.s_w / q.n_w - q.s_l / q.n_l)),
    "sft": lambda q: sft(q.sft_logps, q.sft_tokens),
    "simpo": lambda q: smoothed(
        q.options.beta * (q.chosen / q.n_w - q.rejected / q.n_l) - q.options.simpo_gamma, q.options
    ),
    "cpo": lambda q: smoothed(q.options.beta * (q.chosen - q.rejected), q.options),
    "orpo": lambda q: -q.options.beta * logsigmoid(log_odds(q.chosen / q.n_w) - log_odds(q.rejected / q.n_l)),
    "kto": kto,
    "dpop": dpop,
    "tdpo1": lambda q: -logsigmoid(q.options.beta * (q.a - q.b - (q.k_l - q.k_w))),
    "tdpo2": lambda q: -logsigmoid(q.options.beta * (q.a - q.b - q.options.tdpo_alpha * (q.k_l - q.k_w.detach()))),
    "slic": lambda q: (q.options.slic_delta - q.options.beta * (q.chosen - q.rejected)).relu(),
}


def _of_tokens(given: BatchInputs):
    """(chosen and rejected of policy, reference and KL; their lengths, plain sums of chosen, weights), all [B]."""
    sequences = given.sequences()
    half, read = sequences.num // 2, [given.logps]
    ref_per_token = given.ref is not None and given.ref.shape == given.logps.shape
    if ref_per_token:
        read.append(given.ref)
    if given.kl is not None:
        read.append(given.kl)
    if given.ld_alpha is not None:
        within = sequences.within_shared_length()
        # Selected, not multiplied, at alpha 0: a tail that is left out must not bring its NaN along.
        tails = [given.ld_alpha * x if given.ld_alpha else torch.zeros_like(x) for x in read]
        read = [torch.where(within, x, tail) for x, tail in zip(read, tails)]
    agreement = []
    if given.log_sum_sq_probs is not None:
        agreement.append(given.logps.detach() - given.log_sum_sq_probs)
    plain, *sums = sequences.sums(given.logps, *read, *agreement)  # at once: over ranks, one exchange
    of_read = [sequences.mean(x) for x in sums[: len(read)]] if given.average else sums[: len(read)]
    policy, ref, kl = of_read[0], of_read[1] if ref_per_token else None, of_read[-1] if given.kl is not None else None
    if given.ref is not None and not ref_per_token:
        ref = sequences.whole("ref_logps", given.ref.reshape(-1))
    weights = 1.0
    if agreement:
        weights = sequences.mean(sums[-1]).exp()
        weights = weights[:half] * weights[half:]
    sides = [None if x is None else x[part] for x in (policy, ref, kl) for part in (slice(half), slice(half, None))]
    return sides, (sequences.counts[:half], sequences.counts[half:]), plain[:half], weights


def batch_losses_ref(options: PreferenceOptions, given: BatchInputs) -> tuple[Tensor, ...]:
    """(loss [], losses, rewards of chosen and rejected, their log-probs, all [B]), in the log-probs' dtype."""
    wide, dtype = wide_dtype(given.logps.device), given.logps.dtype
    weights = 1.0
    if given.rejected is None:
        logps, lengths, sft_logps, weights = _of_tokens(given)
    else:
        logps = given.logps, given.rejected, given.ref, given.ref_rejected, given.kl, given.kl_rejected
        lengths = given.chosen_lengths, given.rejected_lengths
        if given.over is not None:
            logps, lengths = sum_of_parts(given.over, logps, lengths)
        sft_logps = logps[0]
    if given.over is not None and isinstance(options.kto_kl, Tensor):
        options = replace(options, kto_kl=given.over.same("kto_kl", options.kto_kl.to(given.logps.device, wide)))
    q = Terms(
        *(0.0 if x is None else cast(x, wide) for x in logps),
        *(None if n is None else n.clamp(min=1).to(wide) for n in lengths),
        cast(sft_logps, wide),
        lengths[0],
        options,
    )
    terms = zip(options.loss_type, options.loss_weights)
    losses = Cast.apply(weights * sum(weight * REFERENCE[name](q) for name, weight in terms), dtype)
    rewards = (q.a, q.b)
    if options.all_are("per_token_reward"):
        rewards = (q.chosen / q.n_w, q.rejected / q.n_l)
    elif options.all_are("kl"):
        rewards = (q.a + q.k_w, q.b + q.k_l)
    return (
        # of the rounded losses, as the templates'; not their mean: an empty batch has loss 0
        Cast.apply(losses.sum(dtype=wide) / max(losses.shape[0], 1), dtype),
        losses,
        *((options.beta * x.detach()).to(dtype) for x in rewards),
        cast(q.chosen, dtype),
        cast(q.rejected, dtype),
    )
