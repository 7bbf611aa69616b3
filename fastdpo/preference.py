"""Sequence level: log-probs of chosen and rejected completions -> preference loss; linear_dpo.py starts
from hidden states.

    losses[i] = sum_l weight_l * loss_l(chosen, rejected, ref_chosen, ref_rejected)[i]    loss = mean(losses)

losses.py lists the losses; each is one row of csrc/shared/preference_losses.h, differentiated by dual numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .autograd import eager
from .distributed.groups import process_group
from .distributed.sequences import (
    SequenceGroup,
    agreement,
    check_gradients,
    described_options,
    described_tensors,
)
from .losses import PreferenceOptions, check_sequences, states_options
from .ops.preference.reference import BatchInputs
from .ops.preference.templates import batch_losses
from .tensors import refuse_transforms

if TYPE_CHECKING:
    from .typed import Group, LossOptions, Unpack


class PreferenceOutput(NamedTuple):
    """fp32, or fp64 for fp64 inputs; the rewards carry no gradient."""

    loss: Tensor  # []
    losses: Tensor  # [B], unreduced
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


@states_options
def preference_loss(
    chosen_logps: Tensor,  # [B]
    rejected_logps: Tensor,  # [B]
    ref_chosen_logps: Tensor | None = None,  # [B]
    ref_rejected_logps: Tensor | None = None,  # [B]
    *,
    chosen_lengths: Tensor | None = None,  # [B]
    rejected_lengths: Tensor | None = None,  # [B]
    chosen_kl: Tensor | None = None,  # [B]
    rejected_kl: Tensor | None = None,  # [B]
    seq_group: Group | None = None,
    seq_grads: str = "sum",
    **options: Unpack[LossOptions],
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
            completion's tokens (a loss that needs lengths divides by them itself).
        ref_chosen_logps, ref_rejected_logps: the same of the reference model; both or neither.
        beta: strength of the tie to the reference; > 0. In ``ipo`` the paper's tau, in ``orpo`` its lambda.
        loss_type: a name or a list of names whose weighted sum is the loss:
            {losses}.
            Those up to ``sft`` are TRL's DPOTrainer's. ``cpo`` and ``orpo`` are the preference terms alone:
            ``["sft", "orpo"]`` adds the likelihood of the chosen completions. ``kto`` is the mean over the two
            sequences of a row, so `loss` is KTO's mean over all 2B.
        loss_weights: one number per loss; ones by default.
        label_smoothing: probability that a label is flipped:
            {label_smoothing}.
        f_divergence_type: {divergences}, for
            {f_divergence}.
        f_alpha_divergence_coef: alpha of ``alpha_divergence``; 1 is ``reverse_kl``.
        discopop_tau: temperature of ``discopop``'s blend; > 0.
        simpo_gamma: target margin of ``simpo``, added inside the sigmoid.
        dpop_lambda: penalty of ``dpop`` for a chosen log-prob below the reference's; >= 0.
        slic_delta: margin of ``slic``; >= 0.
        kto_kl: ``kto``'s estimate of KL(policy || reference), nats, >= 0; a tensor of one element is clamped
            to that, and gets no gradient, as in KTO.
        desirable_weight, undesirable_weight: ``kto``'s weights of chosen and rejected; >= 0.
        tdpo_alpha: ``tdpo2``'s weight of the difference between the two sequences' divergences; >= 0.
        chosen_lengths, rejected_lengths: ``[B]`` integers, completion tokens; below 1 counts as 1 where a
            loss divides by it. Needed by {lengths}.
        chosen_kl, rejected_kl: ``[B]`` in the log-probs' types, nats: KL(reference || policy) of the next token,
            summed over each completion's tokens. Needed by {kl}, and for them alone.
        seq_group: a torch.distributed process group, or a one-dimensional DeviceMesh, whose ranks hold parts of the
            tokens of the same B pairs. Then **all** of the eight tensors are each rank's part: sums over its own
            tokens, how many they are, and the reference's sums over them too; a whole reference log-prob stands on
            one rank, zeros on the others. `kto_kl` is the same on every rank.
        seq_grads: ``"sum"``: each rank's backward gives its own part of every gradient, and the sum over the group
            is the gradient; ``"mean"``: that times the group's size, where what follows averages over its ranks
            (DDP, FSDP). The upstream gradient is the same on every rank.

    Returns:
        PreferenceOutput(loss, losses, chosen_rewards, rejected_rewards). Rewards are ``beta * (logp -
        ref_logp)``; ``beta * logp / length`` when every loss is ``simpo`` or ``orpo`` (beside ``sft``), and
        ``beta * (logp - ref_logp + kl)`` when every loss is {kl} (beside ``sft``), as their trainers
        report. Rows of ``aot`` stay with the row whose policy margin has their rank (chosen
        log-ratio for ``aot_unpaired``).

    Raises:
        ValueError, TypeError: naming the argument and its value; also for an option that no chosen loss uses.

    Guarantees:
        Computed in fp64, rounded once; a finite loss or derivative beyond fp32's range becomes its largest
        number. Bitwise repeatable. Exponents of f-divergences and ``discopop`` are clamped to 80, as TRL
        clamps alpha's, so no margin gives NaN; beyond that they are constants, without gradient. A mean log-prob
        of 0 (above -2^-126), where ``orpo``'s log-odds have a pole, counts there as -2^-24, in value and slope:
        the largest probability below 1 that fp32 holds. Gradients flow from `loss`, `losses` or both, to any of the
        four log-probs and both divergences, but not from ``tdpo2`` to `chosen_kl`, as in its paper. NaN in a row stays
        in that row of `losses` (``sft``, a mean over the batch, spreads it). B = 0 gives a loss of 0 with a working
        backward. No wait for the device.

        With `seq_group` every rank gets the whole result, bit for bit the same, by one exchange in the forward and
        none in the backward. Ranks whose options, shapes, types or kinds of tensors differ raise one ValueError on
        all, which names the first difference; one that raises by itself is named by the others. On the CPU that is
        compared in every call; on a GPU, where it waits, for what the group has not agreed on before, and later
        differences give NaN. Give `linear_logps` a `seed` of its own on each rank: equal ones draw alike.

    Source: TRL 1.16's DPOTrainer; the papers of the single losses are listed in fastdpo/losses.py.
    """
    tensors = (
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths,
        chosen_kl, rejected_kl,
    )  # fmt: skip
    refuse_transforms("fastdpo.preference_loss", *tensors[:4], *tensors[6:])
    if seq_group is not None:
        return eager(_over_ranks, process_group("seq_group", seq_group), seq_grads, options, tensors)
    check_gradients(seq_group, seq_grads)
    options = PreferenceOptions(**options)
    return PreferenceOutput(*batch_losses(options, BatchInputs(*check_sequences(options, *tensors)))[:4])


def _over_ranks(group, seq_grads: str, options: dict, tensors) -> PreferenceOutput:
    with agreement(group, tensors[0]) as described:
        check_gradients(group, seq_grads)
        options = PreferenceOptions(**options)
        checked = check_sequences(options, *tensors)
        described |= {"the function": "preference_loss", "seq_grads": seq_grads, **described_options(options)}
        described |= described_tensors(checked._asdict())
        over = SequenceGroup.of(group, seq_grads).of_call(described)
    return PreferenceOutput(*batch_losses(options, BatchInputs(*checked, over=over))[:4])
