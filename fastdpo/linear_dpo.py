"""From hidden states and the lm_head to the preference loss.

    logps = linear_logps(hidden, weight, labels)      per token, for policy and reference
    losses = preference_loss(sums of the B chosen sequences, of the B rejected ones, the reference's)

Neither the logits nor anything of their size is ever formed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .autograd import eager
from .distributed.dtensor import local_rows
from .distributed.groups import process_group
from .distributed.handshake import announcing
from .distributed.sequences import (
    SequenceGroup,
    agreement,
    check_gradients,
    check_positions,
    described_options,
    described_tensors,
)
from .divergence import reference_divergence
from .head import HEAD_OPTIONS, HeadOptions
from .logps import token_stats
from .losses import LOSSES, PREFERENCE_OPTIONS, PreferenceOptions
from .ops.preference.reference import BatchInputs
from .ops.preference.templates import batch_losses
from .reference_model import Reference, check_reference
from .sequences import check_layout
from .tensors import plain, refuse_transforms
from .validation import check_flag, check_number

if TYPE_CHECKING:
    from .typed import DPOOptions, LoRATensors, OtherDPOOptions, Unpack


class DPOOutput(NamedTuple):
    """fp32, or fp64 for fp64 inputs; the rewards carry no gradient."""

    loss: Tensor  # []
    losses: Tensor  # [B], unreduced
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]
    chosen_logps: Tensor  # [B], as the loss read them
    rejected_logps: Tensor  # [B]


class _DPOOptions(NamedTuple):
    """All options of a call, checked."""

    preference: PreferenceOptions
    head: HeadOptions
    ref_head: HeadOptions  # labels are checked once
    ld_alpha: float | None
    use_weighting: bool
    average_log_prob: bool
    seq_group: object | None  # a process group
    seq_grads: str

    @staticmethod
    def of(
        ld_alpha=None, use_weighting=False, average_log_prob=False, seq_group=None, seq_grads="sum", **options
    ) -> _DPOOptions:
        of_head, of_loss = {}, {}
        for name, value in options.items():
            if name in HEAD_OPTIONS:
                of_head[name] = value
            elif name in PREFERENCE_OPTIONS:
                of_loss[name] = value
            else:
                known = (*_DPO_OPTIONS, *HEAD_OPTIONS, *PREFERENCE_OPTIONS)
                raise TypeError(f"unexpected option {name!r}; the options are {', '.join(known)}")
        head, preference = HeadOptions(**of_head), PreferenceOptions(**of_loss)
        if seq_group is not None:
            seq_group = process_group("seq_group", seq_group)
            # their tokens have the same indices, and would share draws
            head = replace(head, stream=torch.distributed.get_rank(seq_group))
        check_gradients(seq_group, seq_grads)
        if ld_alpha is not None:
            ld_alpha = check_number("ld_alpha", ld_alpha)
            if not 0 <= ld_alpha <= 1:
                raise ValueError(f"ld_alpha must lie in [0, 1]; got {ld_alpha!r}")
        if use_weighting is not False:
            use_weighting = check_flag("use_weighting", use_weighting)
        if average_log_prob is not False:
            average_log_prob = check_flag("average_log_prob", average_log_prob)
        for name in preference.loss_type:
            if use_weighting and LOSSES[name].ranked:
                raise ValueError(f"use_weighting=True weighs rows, but loss_type {name!r} matches them by rank")
            if average_log_prob and LOSSES[name].lengths and name != "sft":
                raise ValueError(
                    f"average_log_prob=True would divide by the length twice: loss_type {name!r} does so itself"
                )
        ref_head = replace(head, check_labels=False) if head.check_labels else head
        return _DPOOptions(preference, head, ref_head, ld_alpha, use_weighting, average_log_prob, seq_group, seq_grads)


_DPO_OPTIONS = ("ld_alpha", "use_weighting", "average_log_prob", "seq_group", "seq_grads")


def linear_dpo_loss(
    hidden: Tensor,  # [2B, T, H] or [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [2B, T] or [N]
    *,
    bias: Tensor | None = None,  # [V]
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | bool | None = None,  # False: none
    ref_logps: Tensor | None = None,  # [2B], or shaped like labels
    cu_seqlens: Tensor | None = None,  # [2B + 1]
    lora: LoRATensors | None = None,
    seq_positions: Tensor | str | None = None,  # shaped like labels
    **options: Unpack[DPOOptions],
) -> DPOOutput:
    """The preference loss of B chosen and rejected completions, straight from hidden states and the lm_head.

    Equivalent to::

        logps = fastdpo.linear_logps(hidden, weight, labels, bias).sum(1)
        ref_logps = fastdpo.linear_logps(ref_hidden, ref_weight, labels, ref_bias).sum(1)
        fastdpo.preference_loss(logps[:B], logps[B:], ref_logps[:B], ref_logps[B:])

    Args:
        hidden: ``[2B, T, H]``, the B chosen sequences first and the B rejected ones after them, already
            aligned with `labels` (the caller shifts); or packed, ``[N, H]`` with `cu_seqlens`, in the same
            order.
        weight, bias, lora: the lm_head, as in `linear_logps`.
        labels: ``[2B, T]`` or ``[N]`` int64 (or int32); `ignore_index` marks prompt and padding.
        ref_hidden: the reference model's hidden states, laid out like `hidden`; scored without gradient.
        ref_weight, ref_bias: the reference's head. Both default to the policy's, `lora` left out: the
            reference of an adapter on the head is the head without it. With `bias` and `ref_weight`,
            `ref_bias` is needed: a tensor, or False for a reference head without one.
            ``tdpo1`` and ``tdpo2`` need it, since they read its whole distribution: both models' log-probs and their
            KL come from one sweep over the two heads (`linear_divergence`), and the KL's gradient is routed too.
        ref_logps: instead of `ref_hidden`, the reference's log-probs: ``[2B]``, per sequence, taken as they
            are whatever `ld_alpha` and `average_log_prob` say; or per token, shaped like `labels`. (``[N]``
            with N = 2B is read as per sequence.) Without any reference the loss is reference-free.
        cu_seqlens: ``[2B + 1]`` int32 or int64 offsets into the packed rows: the first 0, the last N. On a
            GPU, and under torch.compile, their values are checked only with ``check_labels=True``, which waits.
        ld_alpha: LD-DPO, in [0, 1]: weight of the tokens past the shorter length of chosen and rejected.
        use_weighting: WPO: rows are weighted by ``exp(mean(logp - log sum p^2))`` of chosen times rejected,
            detached.
        average_log_prob: sequence log-probs are means over the completion tokens instead of sums. This and `ld_alpha`
            hold for the KL of ``tdpo1`` and ``tdpo2`` too.
        ignore_index, logit_scale, softcap, temperature, backward, tau, seed, vocab_group, check_labels,
            accumulate_into: of `linear_logps`, for policy and reference alike.
        beta, loss_type, loss_weights, label_smoothing, ...: of `preference_loss`; lengths are counted from
            `labels`, and ``sft`` reads plain sums whatever `ld_alpha` and `average_log_prob` say.
        seq_group: a torch.distributed process group, or a one-dimensional DeviceMesh, over whose ranks the tokens of
            every sequence are split (context and sequence parallelism). `hidden`, `labels`, `cu_seqlens`, `ref_hidden`
            and `ref_logps` per token are this rank's part, any number of tokens of each of the same 2B sequences, none
            included; labels are shifted **before** the split. `ref_logps` per sequence are whole, the same on every
            rank. The head is the same, or the same shard of `vocab_group`, another group.
        seq_grads: ``"sum"``: each rank's backward gives exactly the gradient of its own rows, and of parameters its
            part: their sum over the group is the gradient; ``"mean"``: all that times the group's size, where what
            follows averages over its ranks (DDP, FSDP, accelerate). The upstream gradient is the same on every rank.
        seq_positions: for `ld_alpha`, how the tokens of the ranks follow each other: None: contiguous parts in rank
            order; ``"zigzag"``: of 2 * size chunks of a sequence, rank r holds chunk r and then chunk 2 * size - 1 - r,
            equally long; or ``[2B, T]`` or ``[N]`` int64 or int32, each token's position in its whole sequence.

    Returns:
        DPOOutput(loss, losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps). The log-probs
        are those the loss read (after `ld_alpha` and `average_log_prob`) and carry gradients.

    Raises:
        ValueError, TypeError: naming the argument and its value; also for an option that no chosen loss uses.

    Guarantees:
        Those of `linear_logps` and `preference_loss`. Sequence sums are fp64 in a fixed order, rounded once.
        A sequence without completion tokens has log-prob 0 and no gradient; B = 0 gives a loss of 0.

        With `seq_group`: every rank gets the whole result, bit for bit the same; a few numbers per sequence cross in
        the forward (with positions one integer per token, and a wait), nothing in the backward. Ranks never share
        draws. Ranks that disagree on options, layout, types or kinds of tensors all raise one ValueError naming the
        first difference; one that raises by itself is named by the others. On the CPU that is compared in every call;
        on a GPU, where it waits, for what the group has not agreed on before, and later differences give NaN. A call
        breaks torch.compile's graph.

    Source: DPO, arXiv 2305.18290; TDPO, arXiv 2404.11999; LD-DPO, arXiv 2409.06411; WPO, arXiv 2406.11827 eq. 2.
    """
    tensors = (
        hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, ref_logps, cu_seqlens, lora, seq_positions,
    )  # fmt: skip
    return _linear_dpo_loss(options, options.get("seq_group"), *tensors)


def _linear_dpo_loss(options: _DPOOptions | dict, seq_group, *tensors) -> DPOOutput:
    if seq_group is not None:
        return eager(_over_ranks, options, process_group("seq_group", seq_group), *tensors)
    options = options if isinstance(options, _DPOOptions) else _DPOOptions.of(**options)
    return DPOOutput(*batch_losses(options.preference, _scored(options, *tensors)))


def _over_ranks(options: _DPOOptions | dict, group, hidden, weight, *tensors) -> DPOOutput:
    """What of a call is a rank's own comes first, so that the others hear of what it raises."""
    with agreement(group, hidden) as described:
        options = options if isinstance(options, _DPOOptions) else _DPOOptions.of(**options)
        given = _scored(options, hidden, weight, *tensors)
        described |= _described(options, given, hidden, weight, *tensors)
        over = SequenceGroup.of(group, options.seq_grads).of_call(described)
    return DPOOutput(*batch_losses(options.preference, given._replace(over=over)))


def _described(
    options: _DPOOptions, given: BatchInputs, hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, *_
) -> dict[str, object]:
    """What ranks of a `seq_group` must agree on. Not the number of rows, the seed, nor how labels are checked."""
    packed, ref = given.cu_seqlens is not None, given.ref
    kind = None if ref is None else "per token" if ref.shape == given.logps.shape else "per sequence"
    own = ("seed", "vocab_group", "check_labels", "stream")
    head = {name: value for name, value in described_options(options.head).items() if name not in own}
    positions = given.positions
    return {
        "the function": "linear_dpo_loss",
        "the number of sequences": len(given.cu_seqlens) - 1 if packed else len(given.labels),
        "the layout": "packed" if packed else "padded",
        **described_options(options.preference),
        **head,
        **{name: getattr(options, name) for name in _DPO_OPTIONS if name != "seq_group"},
        "seq_positions": "a tensor" if isinstance(positions, Tensor) else positions,
        "ref_logps": kind if ref_hidden is None else "of ref_hidden",
        "the shape of weight": tuple(weight.shape),
        **described_tensors({"hidden": hidden, "weight": weight, "bias": bias}, shape=False),
        "whether logps require a gradient": given.logps.requires_grad,
        "whether ref_logps require a gradient": ref is not None and ref.requires_grad,
    }


def _scored(
    options: _DPOOptions,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | bool | None,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    lora,
    seq_positions: Tensor | str | None,
) -> BatchInputs:
    refuse_transforms("fastdpo.linear_dpo_loss", hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ref_logps)
    with announcing(options.head.vocab_group, hidden):
        rows, labels = local_rows(hidden, labels)
        rows, labels = plain("hidden", rows), plain("labels", labels)
        cu_seqlens = None if cu_seqlens is None else plain("cu_seqlens", cu_seqlens)
        check_layout(rows, labels, cu_seqlens, options.head.check_labels)
        if seq_positions is not None:
            if options.seq_group is None or options.ld_alpha is None:
                missing = "seq_group" if options.seq_group is None else "ld_alpha"
                raise ValueError(f"seq_positions was given without {missing}, and has no effect")
            seq_positions = check_positions(
                seq_positions, labels, options.head.ignore_index, cu_seqlens, options.head.check_labels
            )
        reference = Reference(ref_hidden, ref_weight, None if ref_bias is False else ref_bias, ref_logps)
        reference = check_reference(reference, ref_bias is False, options.preference, weight, bias, labels, cu_seqlens)
    scores = _compared if options.preference.needs_kl() else _logps
    logps, ref_logps, kl, log_sum_sq_probs = scores(options, hidden, weight, labels, bias, lora, reference)
    return BatchInputs(
        logps,
        ref=ref_logps,
        kl=kl,
        labels=labels,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(labels.device),
        log_sum_sq_probs=log_sum_sq_probs,
        ignore_index=options.head.ignore_index,
        average=options.average_log_prob,
        ld_alpha=options.ld_alpha,
        positions=seq_positions,
    )


def _logps(options: _DPOOptions, hidden, weight, labels, bias, lora, reference: Reference):
    statistics = ("log_sum_sq_probs",) if options.use_weighting else ()
    stats = token_stats(hidden, weight, labels, bias=bias, lora=lora, options=options.head, stats=statistics)
    ref_logps = reference.logps
    if reference.hidden is not None:
        with torch.no_grad():
            ref_logps = token_stats(
                reference.hidden, reference.weight, labels, bias=reference.bias, options=options.ref_head
            ).logps
    return stats.logps, ref_logps, None, stats.log_sum_sq_probs


def _compared(options: _DPOOptions, hidden, weight, labels, bias, lora, reference: Reference):
    """Policy and reference in one sweep over both heads; WPO's weights are of another one."""
    student, teacher = (hidden, weight, labels, bias, lora), (reference.hidden, reference.weight, reference.bias)
    found = reference_divergence(*student, *teacher, options=options.head, stats=("logps", "ref_logps"))
    weighting = None
    if options.use_weighting:
        with torch.no_grad():
            stats = token_stats(
                hidden, weight, labels, bias=bias, lora=lora, options=options.ref_head, stats=("log_sum_sq_probs",)
            )
        weighting = stats.log_sum_sq_probs
    return found.logps, found.ref_logps, found.divergence, weighting


class LinearDPOLoss(torch.nn.Module):
    """`linear_dpo_loss` as a module: options at construction, tensors at the call.

    Args:
        beta, loss_type, **options: every option of `linear_dpo_loss`; checked here.

    Raises:
        ValueError, TypeError: naming the option and its value.
    """

    def __init__(
        self, beta: float = 0.1, loss_type: str | list[str] = "sigmoid", **options: Unpack[OtherDPOOptions]
    ) -> None:
        super().__init__()
        self.given = {"beta": beta, "loss_type": loss_type, **options}
        self.options = _DPOOptions.of(**self.given)

    def forward(
        self,
        hidden: Tensor,  # [2B, T, H] or [N, H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [2B, T] or [N]
        bias: Tensor | None = None,  # [V]
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | bool | None = None,  # False: none
        ref_logps: Tensor | None = None,  # [2B], or shaped like labels
        cu_seqlens: Tensor | None = None,  # [2B + 1]
        lora: LoRATensors | None = None,
        seq_positions: Tensor | str | None = None,  # shaped like labels
    ) -> DPOOutput:
        """Arguments and result are those of `linear_dpo_loss`."""
        tensors = (
            hidden, weight, labels, bias, ref_hidden, ref_weight, ref_bias, ref_logps, cu_seqlens, lora, seq_positions,
        )  # fmt: skip
        return _linear_dpo_loss(self.options, self.options.seq_group, *tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.given.items())
