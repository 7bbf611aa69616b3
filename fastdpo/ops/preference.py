"""Which engine computes the preference losses: csrc's templates on the CPU, otherwise plain torch."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..autograd import once_differentiable, traced
from ..losses import RANKED, PreferenceOptions
from . import preference_native
from .preference_reference import cast, preference_losses_ref, sft, wide_dtype


class PreferenceLossFunction(torch.autograd.Function):
    """Autograd for the losses of one row: ``apply(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths,
    rejected_lengths, options) -> losses [B]``, on the CPU, without validation; refs and lengths may be None.

    Log-probs are [B] of one dtype, fp32 or fp64; lengths are int64; `options` comes from
    `losses.check_options`. ``sft`` has no row of its own and is not taken; rows of ``aot`` and
    ``aot_unpaired`` must be matched by rank. Saved: the four partial derivatives, [4, B]. Double backward
    raises RuntimeError.
    """

    @staticmethod
    def forward(ctx, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, options):
        losses, partials = preference_native.preference_losses(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, options
        )
        ctx.save_for_backward(chosen, rejected, ref_chosen, ref_rejected, partials)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        *_, partials = ctx.saved_tensors
        grads = [dlosses * partial if need else None for need, partial in zip(ctx.needs_input_grad, partials)]
        return (*grads, None, None, None)


def _use_native(device: torch.device, options: PreferenceOptions) -> bool:
    if isinstance(options.kto_kl, Tensor) and traced(options.kto_kl):
        return False  # the templates take numbers
    return device.type == "cpu" and preference_native.AVAILABLE and os.environ.get("FASTDPO_ENGINE") != "reference"


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
    """The weighted sum of the losses, [B]; `sft_logps` are sums of chosen tokens, whatever `chosen` is."""
    logps = (chosen, rejected, ref_chosen, ref_rejected)
    lengths = (chosen_lengths, rejected_lengths)
    if not _use_native(chosen.device, options):
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
