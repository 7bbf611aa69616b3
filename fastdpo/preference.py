"""Sequence level: log-probs of chosen and rejected completions -> preference loss; linear_dpo.py starts
from hidden states.

    losses[i] = sum_l weight_l * loss_l(chosen, rejected, ref_chosen, ref_rejected)[i]    loss = mean(losses)

losses.py lists the losses; each is one expression in csrc/shared/preference_loss.h, differentiated by dual numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_dpo import DPOOutput, LinearDPOLoss, linear_dpo_loss
from .losses import LOSSES, PreferenceOptions, check_options, check_reference_use
from .ops.preference.losses import PreferenceLossFunction, batch_losses, mean_loss, rewards, sequence_losses
from .ops.preference.reference import cast
from .tensors import plain, refuse_transforms, traced
from .validation import FLOATS

__all__ = [
    "DPOOutput",
    "LinearDPOLoss",
    "PreferenceLossFunction",
    "PreferenceOutput",
    "linear_dpo_loss",
    "preference_loss",
]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class PreferenceOutput(NamedTuple):
    """fp32, or fp64 for fp64 inputs; the rewards carry no gradient."""

    loss: Tensor  # []
    losses: Tensor  # [B], unreduced
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


def preference_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor | None = None,  # [B]
    ref_rejected_logps: Tensor | None = None,  # [B]
    *,
    beta: float = 0.1,
    loss_type: str | list[str] = "sigmoid",
    loss_weights: list[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    dpop_lambda: float = 50.0,
    slic_delta: float = 1.0,
    kto_kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    chosen_lengths: Tensor | None = None,  # [B]
    rejected_lengths: Tensor | None = None,  # [B]
) -> PreferenceOutput:
    """The preference loss of B chosen and rejected completions, from their sequence log-probabilities.

    Equivalent, for the default `loss_type`, to::

        margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        losses = -torch.nn.functional.logsigmoid(beta * margin)
        loss = losses.mean()

    Without reference log-probs they count as zero. So ``preference_loss(chosen_scores, rejected_scores,
    beta=1.0)`` is the Bradley-Terry loss of a reward model.

    Args:
        chosen_logps, rejected_logps: ``[B]`` fp32, bf16, fp16 or fp64, nats: log-probs summed over each
            completion's tokens (``simpo``, ``orpo``, ``ipo`` and ``sigmoid_norm`` divide by the lengths
            themselves).
        ref_chosen_logps, ref_rejected_logps: the same of the reference model; both or neither.
        beta: strength of the tie to the reference; > 0. In ``ipo`` the paper's tau, in ``orpo`` its lambda.
        loss_type: a name or a list of names whose weighted sum is the loss: ``sigmoid``, ``robust``, ``ipo``,
            ``hinge``, ``exo_pair``, ``nca_pair``, ``bco_pair``, ``sppo_hard``, ``aot``, ``aot_unpaired``,
            ``apo_zero``, ``apo_down``, ``discopop``, ``sigmoid_norm``, ``sft``, ``simpo``, ``cpo``, ``orpo``,
            ``kto``, ``dpop``, ``slic``. The first fifteen are those of TRL's DPOTrainer. ``cpo`` and ``orpo``
            are the preference terms alone: ``["sft", "orpo"]`` adds the likelihood of the chosen completions.
            ``kto`` is the mean over the two sequences of a row, so `loss` is KTO's mean over all 2B.
        loss_weights: one number per loss; ones by default.
        label_smoothing: probability that a label is flipped: in [0, 0.5] for ``sigmoid`` (conservative DPO),
            ``aot``, ``aot_unpaired``, ``simpo`` and ``cpo``; in [0, 0.5) for ``robust``; in (0, 0.5] for
            ``exo_pair``.
        f_divergence_type: ``reverse_kl``, ``forward_kl``, ``js_divergence`` or ``alpha_divergence``, for
            ``sigmoid``, ``sigmoid_norm``, ``hinge``, ``ipo``, ``exo_pair``, ``robust`` and ``discopop``.
        f_alpha_divergence_coef: alpha of ``alpha_divergence``; 1 is ``reverse_kl``.
        discopop_tau: temperature of ``discopop``'s blend; > 0.
        simpo_gamma: target margin of ``simpo``, added inside the sigmoid.
        dpop_lambda: penalty of ``dpop`` for a chosen log-prob below the reference's; >= 0.
        slic_delta: margin of ``slic``; >= 0.
        kto_kl: ``kto``'s estimate of KL(policy || reference), nats, >= 0; a tensor of one element is clamped
            to that, and gets no gradient, as in KTO.
        desirable_weight, undesirable_weight: ``kto``'s weights of chosen and rejected; >= 0.
        chosen_lengths, rejected_lengths: ``[B]`` integers, completion tokens; below 1 counts as 1 where a
            loss divides by it. Needed by ``ipo``, ``sigmoid_norm``, ``simpo`` and ``orpo``; ``sft`` needs the
            chosen ones.

    Returns:
        PreferenceOutput(loss, losses, chosen_rewards, rejected_rewards). Rewards are ``beta * (logp -
        ref_logp)``; ``beta * logp / length`` when every loss is ``simpo`` or ``orpo`` (beside ``sft``), as
        their trainers report. Rows of ``aot`` stay with the row whose policy margin has their rank (chosen
        log-ratio for ``aot_unpaired``).

    Raises:
        ValueError, TypeError: naming the argument and its value; also for an option that no chosen loss uses.

    Guarantees:
        Computed in fp64, rounded once; a finite loss or derivative beyond fp32's range becomes its largest
        number. Bitwise repeatable. Exponents of f-divergences and ``discopop`` are clamped to 80, as TRL
        clamps alpha's, so no margin gives NaN; beyond that they are constants, without gradient. A mean log-prob
        of 0 (above -2^-126), where ``orpo``'s log-odds have a pole, counts there as -2^-24, in value and slope:
        the largest probability below 1 that fp32 holds. Gradients flow from `loss`, `losses` or both, to any of the
        four log-probs. NaN in a row stays in that row of `losses` (``sft``, a mean over the batch, spreads
        it). B = 0 gives a loss of 0 with a working backward. No wait for the device.

    Source: TRL 1.16's DPOTrainer; the papers of the single losses are listed in fastdpo/losses.py.
    """
    refuse_transforms("fastdpo.preference_loss", chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    options = check_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        dpop_lambda=dpop_lambda,
        slic_delta=slic_delta,
        kto_kl=kto_kl,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    check_reference_use(options, ref_chosen_logps is not None or ref_rejected_logps is not None, "ref_chosen_logps")
    chosen, rejected, ref_chosen, ref_rejected = _check_logps(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    lengths = _check_lengths(options, chosen_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    whole = batch_losses(
        options, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
    )
    if whole is not None:
        return PreferenceOutput(*whole[:4])
    losses = sequence_losses(options, chosen, rejected, ref_chosen, ref_rejected, *lengths, sft_logps=chosen)
    return PreferenceOutput(
        mean_loss(losses),
        losses,
        rewards(options, chosen, ref_chosen, lengths[0]),
        rewards(options, rejected, ref_rejected, lengths[1]),
    )


def _check_logps(**logps: Tensor | None) -> list[Tensor | None]:
    given = {name: x for name, x in logps.items() if x is not None or not name.startswith("ref_")}
    if len(given) == 3:
        (missing,) = set(logps) - set(given)
        raise ValueError(f"{missing} is None: give the reference log-probs of both sides, or neither")
    like = plain(*next(iter(given.items())))
    dtype = torch.float32
    for name, x in given.items():
        x = given[name] = plain(name, x)
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
        _check_rows(name, x, like)
        dtype = torch.promote_types(dtype, x.dtype)
    return [cast(given[name], dtype) if name in given else None for name in logps]


def _check_rows(name: str, x: Tensor, like: Tensor) -> None:
    if like.ndim != 1:
        raise ValueError(f"chosen_logps must be 1-D, one log-prob per sequence; got shape {tuple(like.shape)}")
    if x.shape != like.shape:
        raise ValueError(f"{name} must be shaped like chosen_logps, {tuple(like.shape)}; got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but chosen_logps is on {like.device}")


def _check_lengths(options: PreferenceOptions, like: Tensor, **lengths: Tensor | None) -> list[Tensor | None]:
    for loss in options.loss_type:
        for name in LOSSES[loss].lengths:
            if lengths[name] is None:
                raise ValueError(f"{name} is None, but loss_type {loss!r} needs it")
    for name, x in lengths.items():
        if x is None:
            continue
        if isinstance(x, Tensor):
            x = lengths[name] = plain(name, x)
        if not isinstance(x, Tensor) or x.dtype not in INTEGERS:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of integers; got {kind}")
        _check_rows(name, x, like)
        # Reading values would wait for a GPU and break a compiled graph; there 0 or less counts as 1.
        if x.device.type == "cpu" and not traced(x) and x.numel() and x.min() < 0:
            raise ValueError(f"{name} must not be negative; got {int(x.min())}")
    return [None if x is None else x.to(torch.int64) for x in lengths.values()]
