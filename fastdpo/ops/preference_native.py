"""csrc/cpu_preference.cpp as a torch operator: losses and their four partial derivatives in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import PreferenceOptions
from . import native

# Read once: torch.compile cannot look into the extension. One built from an older csrc may lack the losses.
_extension = native.extension()
AVAILABLE = hasattr(_extension, "preference_loss")
LOSS_IDS: dict[str, int] = _extension.PREFERENCE_LOSSES if AVAILABLE else {}
DIVERGENCE_IDS: dict[str, int] = _extension.DIVERGENCES if AVAILABLE else {}
OPTION_ORDER: list[str] = _extension.PREFERENCE_OPTIONS if AVAILABLE else []


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@torch.library.custom_op("fastdpo::preference_losses", mutates_args=(), device_types="cpu")
def preference_losses_op(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    loss_ids: Sequence[int],
    loss_weights: Sequence[float],
    divergence: int,
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    arrays = [
        None if x is None else x.contiguous()
        for x in (chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    ]
    batch_size = chosen.shape[0]
    losses = chosen.new_empty(batch_size)
    partials = chosen.new_empty(4, batch_size)
    _extension.preference_loss(
        chosen.dtype == torch.float64,
        *map(_address, arrays),
        _address(losses),
        _address(partials),
        batch_size,
        list(loss_ids),
        list(loss_weights),
        divergence,
        list(options),
    )
    return losses, partials


@preference_losses_op.register_fake
def _(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, *scalars):
    return chosen.new_empty(chosen.shape), chosen.new_empty(4, *chosen.shape)


def preference_losses(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    options: PreferenceOptions,
) -> tuple[Tensor, Tensor]:
    """[B] inputs of one dtype, fp32 or fp64, lengths int64 -> losses [B], partials [4, B]; no autograd."""
    return preference_losses_op(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        chosen_lengths,
        rejected_lengths,
        [LOSS_IDS[name] for name in options.loss_type],
        list(options.loss_weights),
        DIVERGENCE_IDS[options.f_divergence_type],
        [float(getattr(options, name)) for name in OPTION_ORDER],
    )
