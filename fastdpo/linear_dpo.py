"""From hidden states and the lm_head to the preference loss.

    logps = linear_logps(hidden, weight, labels)      per token, for policy and reference
    losses = preference_loss(sums of the B chosen sequences, of the B rejected ones, the reference's)

Neither the logits nor anything of their size is ever formed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from .head import HeadOptions
from .logps import TokenStats, linear_token_stats
from .losses import LOSSES, RANKED, PreferenceOptions, check_options, check_reference_use
from .ops.preference.losses import batch_losses, mean_loss, rewards, sequence_losses
from .ops.preference.reference import cast
from .sequences import Sequences, check_layout, num_sequences
from .tensors import plain, plain_or_none, refuse_transforms
from .validation import FLOATS, check_flag, check_number


class DPOOutput(NamedTuple):
    """fp32, or fp64 for fp64 inputs; the rewards carry no gradient."""

    loss: Tensor  # []
    losses: Tensor  # [B], unreduced
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]
    chosen_logps: Tensor  # [B], as the loss read them
    rejected_logps: Tensor  # [B]


class _DPOOptions(NamedTuple):
    preference: PreferenceOptions
    head: dict  # options of linear_logps
    ld_alpha: float | None
    use_weighting: bool
    average_log_prob: bool


_HEAD_OPTIONS = tuple(field.name for field in fields(HeadOptions) if field.name != "lora_scale")


def _check_dpo_options(
    ld_alpha: float | None = None, use_weighting: bool = False, average_log_prob: bool = False, **options
) -> _DPOOptions:
    unknown = [name for name in options if name not in _HEAD_OPTIONS and name not in PreferenceOptions._fields]
    if unknown:
        known = ("ld_alpha", "use_weighting", "average_log_prob", *_HEAD_OPTIONS, *PreferenceOptions._fields)
        raise TypeError(f"unexpected option {unknown[0]!r}; the options are {', '.join(known)}")
    head = {name: value for name, value in options.items() if name in _HEAD_OPTIONS}
    checked = HeadOptions(**head)  # raises what linear_logps would, before any work is done
    head = {name: getattr(checked, name) for name in head}
    preference = check_options(**{name: value for name, value in options.items() if name not in head})
    use_weighting = check_flag("use_weighting", use_weighting)
    average_log_prob = check_flag("average_log_prob", average_log_prob)
    if ld_alpha is not None:
        ld_alpha = check_number("ld_alpha", ld_alpha)
        if not 0 <= ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1]; got {ld_alpha!r}")
    for name in preference.loss_type:
        if use_weighting and name in RANKED:
            raise ValueError(f"use_weighting=True weighs rows, but loss_type {name!r} matches them by rank")
        if average_log_prob and LOSSES[name].lengths and name != "sft":
            raise ValueError(
                f"average_log_prob=True would divide by the length twice: loss_type {name!r} does so itself"
            )
    return _DPOOptions(preference, head, ld_alpha, use_weighting, average_log_prob)


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
    lora=None,
    **options,
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
        ref_logps: instead of `ref_hidden`, the reference's log-probs: ``[2B]``, per sequence, taken as they
            are whatever `ld_alpha` and `average_log_prob` say; or per token, shaped like `labels`. (``[N]``
            with N = 2B is read as per sequence.) Without any reference the loss is reference-free.
        cu_seqlens: ``[2B + 1]`` int32 or int64 offsets into the packed rows: the first 0, the last N. On a
            GPU, and under torch.compile, their values are checked only with ``check_labels=True``, which waits.
        ld_alpha: LD-DPO, in [0, 1]: weight of the tokens past the shorter length of chosen and rejected.
        use_weighting: WPO: rows are weighted by ``exp(mean(logp - log sum p^2))`` of chosen times rejected,
            detached.
        average_log_prob: sequence log-probs are means over the completion tokens instead of sums.
        ignore_index, logit_scale, softcap, temperature, backward, tau, seed, vocab_group, check_labels: of
            `linear_logps`, for policy and reference alike.
        beta, loss_type, loss_weights, label_smoothing, ...: of `preference_loss`; lengths are counted from
            `labels`, and ``sft`` reads plain sums whatever `ld_alpha` and `average_log_prob` say.

    Returns:
        DPOOutput(loss, losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps). The log-probs
        are those the loss read (after `ld_alpha` and `average_log_prob`) and carry gradients.

    Raises:
        ValueError, TypeError: naming the argument and its value; also for an option that no chosen loss uses.

    Guarantees:
        Those of `linear_logps` and `preference_loss`. Sequence sums are fp64 in a fixed order, rounded once.
        A sequence without completion tokens has log-prob 0 and no gradient; B = 0 gives a loss of 0.

    Source: DPO, arXiv 2305.18290; LD-DPO, arXiv 2409.06411; WPO, arXiv 2406.11827 eq. 2.
    """
    reference = _Reference(ref_hidden, ref_weight, None if ref_bias is False else ref_bias, ref_logps)
    given = _check_dpo_options(**options)
    return _linear_dpo_loss(hidden, weight, labels, bias, lora, cu_seqlens, reference, ref_bias is False, given)


class _Reference(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logps: Tensor | None


def _linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora,
    cu_seqlens: Tensor | None,
    reference: _Reference,
    ref_without_bias: bool,  # whatever the policy has
    options: _DPOOptions,
) -> DPOOutput:
    refuse_transforms("fastdpo.linear_dpo_loss", hidden, weight, bias)
    hidden, weight, labels = plain("hidden", hidden), plain("weight", weight), plain("labels", labels)
    bias, cu_seqlens = plain_or_none("bias", bias), plain_or_none("cu_seqlens", cu_seqlens)
    reference = _Reference(*(plain_or_none(f"ref_{field}", x) for field, x in reference._asdict().items()))
    check_layout(hidden, labels, cu_seqlens, options.head.get("check_labels", False))
    _check_reference(reference, ref_without_bias, weight, bias, labels, num_sequences(labels, cu_seqlens), options)
    stats = linear_token_stats(
        hidden,
        weight,
        labels,
        bias,
        stats=("log_sum_sq_probs",) if options.use_weighting else (),
        lora=lora,
        **options.head,
    )
    ref_logps = reference.logps
    if cu_seqlens is not None and ref_logps is not None and ref_logps.shape == (cu_seqlens.shape[0] - 1,):
        ref_logps = ref_logps[:, None]  # per sequence, also where there are as many tokens
    if reference.hidden is not None:
        ref_weight = weight if reference.weight is None else reference.weight
        ref_bias = bias if reference.bias is None and not ref_without_bias else reference.bias
        head = {**options.head, "check_labels": False}
        with torch.no_grad():
            ref_logps = linear_token_stats(reference.hidden, ref_weight, labels, ref_bias, stats=(), **head).logps

    ignore_index = options.head.get("ignore_index", -100)
    whole = batch_losses(
        options.preference,
        stats.logps,
        None,
        ref_logps,
        None,
        labels=labels,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(labels.device),
        log_sum_sq_probs=stats.log_sum_sq_probs,
        ignore_index=ignore_index,
        average=options.average_log_prob,
        ld_alpha=options.ld_alpha,
    )
    if whole is not None:
        return DPOOutput(*whole)
    return _in_steps(stats, ref_logps, Sequences(labels, ignore_index, cu_seqlens), options)


def _in_steps(stats: TokenStats, ref_logps: Tensor | None, sequences: Sequences, options: _DPOOptions) -> DPOOutput:
    """What `batch_losses` does in one call, in operations of torch."""
    dtype = stats.logps.dtype
    sums = sequences.sum(stats.logps)
    policy = _sequence_logps(options, sequences, stats.logps, sums)
    if ref_logps is not None and ref_logps.shape != stats.logps.shape:
        ref_logps = ref_logps.reshape(-1)
    elif ref_logps is not None:
        ref_logps = _sequence_logps(options, sequences, ref_logps, sequences.sum(ref_logps))
    half = sequences.num // 2
    chosen, rejected = policy[:half], policy[half:]
    refs = (None, None) if ref_logps is None else (x.to(sums) for x in (ref_logps[:half], ref_logps[half:]))
    ref_chosen, ref_rejected = refs
    lengths = sequences.counts[:half], sequences.counts[half:]
    losses = sequence_losses(
        options.preference, chosen, rejected, ref_chosen, ref_rejected, *lengths, sft_logps=sums[:half]
    )
    if options.use_weighting:
        agreement = sequences.sum(stats.logps.detach() - stats.log_sum_sq_probs)
        weights = sequences.mean(agreement).exp()
        losses = losses * (weights[:half] * weights[half:])
    return DPOOutput(
        cast(mean_loss(losses), dtype),
        cast(losses, dtype),
        rewards(options.preference, chosen, ref_chosen, lengths[0]).to(dtype),
        rewards(options.preference, rejected, ref_rejected, lengths[1]).to(dtype),
        cast(chosen, dtype),
        cast(rejected, dtype),
    )


def _sequence_logps(options: _DPOOptions, sequences: Sequences, logps: Tensor, sums: Tensor) -> Tensor:
    """[2B] log-probs as the loss reads them; `sums` are the plain ones."""
    if options.ld_alpha is not None:
        # Selected, not multiplied, at alpha 0: a tail that is left out must not bring its NaN along.
        tail = options.ld_alpha * logps if options.ld_alpha else torch.zeros_like(logps)
        sums = sequences.sum(torch.where(sequences.within_shared_length(), logps, tail))
    return sequences.mean(sums) if options.average_log_prob else sums


def _check_reference(
    reference: _Reference, without_bias: bool, weight, bias, labels: Tensor, num_sequences: int, options: _DPOOptions
) -> None:
    if without_bias:
        check_reference_use(options.preference, True, "ref_bias")
        if reference.hidden is None:
            raise ValueError("ref_bias=False was given without ref_hidden")
    for field, x in reference._asdict().items():
        if x is None:
            continue
        name = f"ref_{field}"
        check_reference_use(options.preference, True, name)
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
        if x.device != labels.device:
            raise ValueError(f"{name} is on {x.device} but labels is on {labels.device}")
        if field in ("weight", "bias") and reference.hidden is None:
            raise ValueError(f"{name} of shape {tuple(x.shape)} was given without ref_hidden")
    if reference.logps is not None:
        if reference.hidden is not None:
            raise ValueError("ref_hidden and ref_logps were both given: the reference has one source")
        if reference.logps.shape not in ((num_sequences,), labels.shape):
            raise ValueError(
                f"ref_logps must be per sequence, {(num_sequences,)}, or per token, {tuple(labels.shape)}; "
                f"got shape {tuple(reference.logps.shape)}"
            )
    if reference.hidden is None:
        return
    if reference.hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"ref_hidden must be laid out like hidden, [{', '.join(map(str, labels.shape))}, H]; "
            f"got shape {tuple(reference.hidden.shape)}"
        )
    if reference.weight is not None:
        if reference.weight.ndim != 2 or reference.weight.shape[1] != reference.hidden.shape[-1]:
            raise ValueError(
                f"ref_weight must be [V, H] with H = {reference.hidden.shape[-1]} of ref_hidden; "
                f"got shape {tuple(reference.weight.shape)}"
            )
        if bias is not None and reference.bias is None and not without_bias:
            raise ValueError(
                "ref_weight was given without ref_bias, but the policy's head has a bias: give the reference's, or "
                "ref_bias=False where it has none"
            )
    elif reference.hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"ref_hidden has H = {reference.hidden.shape[-1]} but weight has H = {weight.shape[-1]}: give ref_weight"
        )
    ref_weight = weight if reference.weight is None else reference.weight
    if isinstance(ref_weight, Tensor) and torch.float64 in (kinds := {reference.hidden.dtype, ref_weight.dtype}):
        if len(kinds) > 1:
            raise TypeError(
                "fp64 is for checking: all of the reference's head and ref_hidden must be fp64 or none; got ref_hidden "
                f"{reference.hidden.dtype}, its weight {ref_weight.dtype}"
            )
    if reference.bias is not None and isinstance(ref_weight, Tensor) and reference.bias.shape != ref_weight.shape[:1]:
        raise ValueError(
            f"ref_bias must have shape ({ref_weight.shape[0]},), the rows of the reference's head; "
            f"got {tuple(reference.bias.shape)}"
        )


class LinearDPOLoss(torch.nn.Module):
    """`linear_dpo_loss` as a module: options at construction, tensors at the call.

    Args:
        beta, loss_type, **options: every option of `linear_dpo_loss`; checked here.

    Raises:
        ValueError, TypeError: naming the option and its value.
    """

    def __init__(self, beta: float = 0.1, loss_type: str | list[str] = "sigmoid", **options):
        super().__init__()
        self.given = {"beta": beta, "loss_type": loss_type, **options}
        self.options = _check_dpo_options(**self.given)

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
        lora=None,
    ) -> DPOOutput:
        """Arguments and result are those of `linear_dpo_loss`."""
        reference = _Reference(ref_hidden, ref_weight, None if ref_bias is False else ref_bias, ref_logps)
        without = ref_bias is False
        return _linear_dpo_loss(hidden, weight, labels, bias, lora, cu_seqlens, reference, without, self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.given.items())
