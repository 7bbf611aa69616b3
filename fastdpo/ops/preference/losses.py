"""Which engine computes the preference losses: csrc's templates, in one launch each way, otherwise plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...autograd import Function, once_differentiable
from ...losses import RANKED, PreferenceOptions
from . import templates as preference_native
from .reference import cast, preference_losses_ref, sft, wide_dtype
from .templates import Spec


def _forward(ctx, spec: Spec, *tensors: Tensor | None) -> list[Tensor]:
    """[loss, losses, rewards of chosen and of rejected, their log-probs]"""
    *results, partials, sums = preference_native.preference_forward_op(*tensors, *spec.arguments())
    ctx.spec = spec
    ctx.save_for_backward(partials, sums, *tensors[:6])
    return results


def _backward(ctx, needs, *upstream: Tensor | None) -> list[Tensor | None]:
    """Gradients of (logps, rejected, ref, ref_rejected) as far as `needs` them, from those of
    (loss, losses, chosen log-probs, rejected log-probs)."""
    partials, sums, *tensors = ctx.saved_tensors
    if all(x is None for x in upstream):
        return [None] * 4
    spec = ctx.spec
    made = iter(
        preference_native.preference_backward_op(
            partials, sums, *tensors, *upstream, list(needs),
            spec.ignore_index, spec.average, spec.ld_alpha, spec.sft_weight,
        )
    )  # fmt: skip
    return [next(made) if need else None for need in needs]


class PreferenceLossFunction(Function):
    """Autograd for the losses of one row: ``apply(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths,
    rejected_lengths, options) -> losses [B]``, without validation; refs and lengths may be None.

    Log-probs are [B] of one dtype, fp32 or (on the CPU) fp64; lengths are int64; `options` comes from
    `losses.check_options`. Rows of ``aot`` and ``aot_unpaired`` must be matched by rank. Needs the native extension
    (`fastdpo.backends()`), for CUDA tensors with CUDA kernels. Saved: five derivatives of every row. Double backward
    raises RuntimeError.
    """

    of = "fastdpo.preference_loss"

    @staticmethod
    def forward(ctx, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, options):
        lengths = (chosen_lengths, rejected_lengths)
        kto_kl = _kto_kl(options, chosen.device)
        logps = (chosen, rejected, ref_chosen, ref_rejected)
        return _forward(ctx, Spec.of(options), *logps, None, None, *lengths, None, kto_kl)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        return (*_backward(ctx, ctx.needs_input_grad[:4], None, dlosses, None, None), None, None, None)


class BatchLossFunction(Function):
    """``apply(spec, logps, rejected, ref, ref_rejected, labels, cu_seqlens, chosen_lengths, rejected_lengths,
    log_sum_sq_probs, kto_kl) -> (loss, losses, rewards of chosen and of rejected, their log-probs)``: the arguments
    of `preference_native.preference_forward_op`. Double backward raises RuntimeError.
    """

    of = "fastdpo.preference_loss"

    @staticmethod
    def forward(ctx, spec, *tensors):
        ctx.set_materialize_grads(False)
        results = _forward(ctx, spec, *tensors)
        ctx.mark_non_differentiable(results[2], results[3])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dlosses, _, __, dchosen, drejected):
        gradients = _backward(ctx, ctx.needs_input_grad[1:5], dloss, dlosses, dchosen, drejected)
        return None, *gradients, None, None, None, None, None, None


def _kto_kl(options: PreferenceOptions, device: torch.device) -> Tensor | None:
    given = options.kto_kl
    return given.to(device, torch.float64) if isinstance(given, Tensor) else None


def batch_losses(
    options: PreferenceOptions,
    logps: Tensor,
    rejected: Tensor | None,
    ref: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    log_sum_sq_probs: Tensor | None = None,
    **layout,
) -> tuple[Tensor, ...] | None:
    """(loss, losses, rewards of chosen and of rejected, their log-probs) by the templates, one call each way; None
    where they cannot have it: of an empty batch, and of losses that match rows by rank, which need a sort first.

    Arguments are those of `preference_native.preference_forward_op`; `layout` are options of `Spec.of`.
    """
    pairs = logps.shape[0] if rejected is not None else (logps if cu_seqlens is None else cu_seqlens).shape[0] // 2
    wider = ref is not None and torch.promote_types(ref.dtype, logps.dtype) != logps.dtype
    ranked = any(name in RANKED for name in options.loss_type)
    if pairs == 0 or wider or ranked or preference_native.problem(logps.device, logps.dtype) is not None:
        return None
    if ref is not None:
        ref = ref.to(logps.dtype)
    return BatchLossFunction.apply(
        Spec.of(options, **layout), logps, rejected, ref, ref_rejected, labels, cu_seqlens, chosen_lengths,
        rejected_lengths, log_sum_sq_probs, _kto_kl(options, logps.device),
    )  # fmt: skip


def sequence_losses(
    options: PreferenceOptions,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    *,
    sft_logps: Tensor,
) -> Tensor:
    """The weighted sum of the losses, [B], where `batch_losses` cannot have it; `sft_logps` are sums of chosen tokens,
    whatever `chosen` is."""
    logps = (chosen, rejected, ref_chosen, ref_rejected)
    lengths = (chosen_lengths, rejected_lengths)
    if preference_native.problem(chosen.device, chosen.dtype) is not None:
        return preference_losses_ref(options, *logps, *lengths, sft_logps)
    rowwise = [term for term in options.terms if term[0] != "sft" and term[0] not in RANKED]
    parts = []
    if rowwise:
        parts.append(PreferenceLossFunction.apply(*logps, *lengths, options.only(rowwise)))
    for name, weight in options.terms:
        if name in RANKED:
            matched = _match_by_rank(name, *logps)
            parts.append(PreferenceLossFunction.apply(*matched, *lengths, options.only([(name, weight)])))
        elif name == "sft":
            total = cast(sft_logps, wide_dtype(sft_logps.device))
            parts.append(cast(weight * sft(total, chosen_lengths), chosen.dtype))
    return sum(parts[1:], parts[0])


def _match_by_rank(name, chosen, rejected, ref_chosen, ref_rejected):
    """Gives row i, of the other side, the row with the same rank, so that losses stay in the rows' order."""
    if name == "aot":
        if ref_chosen is None:
            return chosen, rejected, None, None
        match = _same_rank(_difference(chosen, rejected), _difference(ref_chosen, ref_rejected))
        return chosen, rejected, ref_chosen[match], ref_rejected[match]
    match = _same_rank(_difference(chosen, ref_chosen), _difference(rejected, ref_rejected))
    return chosen, rejected[match], ref_chosen, None if ref_rejected is None else ref_rejected[match]


def _difference(x: Tensor, y: Tensor | None) -> Tensor:
    x = x.detach().to(wide_dtype(x.device))
    return x if y is None else x - y.detach().to(x.dtype)


def _same_rank(x: Tensor, y: Tensor) -> Tensor:
    """[B] such that y[result[i]] has among y the rank of x[i] among x."""
    match = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    match[x.argsort(stable=True)] = y.argsort(stable=True)
    return match


def mean_loss(losses: Tensor) -> Tensor:
    # sum / B instead of mean: an empty batch has loss 0. Wide, so that the sum of finite losses is finite.
    return (losses.sum(dtype=wide_dtype(losses.device)) / max(losses.shape[0], 1)).to(losses.dtype)


@torch.no_grad()
def rewards(options: PreferenceOptions, logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None) -> Tensor:
    if options.per_token_reward:
        return options.beta * (logps / lengths.clamp(min=1))
    return options.beta * (logps if ref_logps is None else logps - ref_logps)
