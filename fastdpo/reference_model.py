"""What stands for the reference model in `linear_dpo_loss`: hidden states and a head, or log-probs; and their check."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distributed.dtensor import local_rows, plain_or_dtensor
from .losses import PreferenceOptions
from .tensors import plain
from .validation import FLOATS


class Reference(NamedTuple):
    """What the reference's log-probs come from: a head, or they themselves."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logps: Tensor | None


def check_reference(
    given: Reference, without_bias: bool, options: PreferenceOptions, weight, bias, labels: Tensor, cu_seqlens
) -> Reference:
    """Plain tensors, with the policy's head where the reference has no other; ValueError or TypeError unless they fit
    the policy's. Log-probs per sequence of packed tokens are a column, also where there are as many tokens."""
    checked = []
    for field, x in zip(Reference._fields, given):
        name = f"ref_{field}"
        if x is not None:
            if field == "hidden":
                x, _ = local_rows(x, labels, name)
            x = plain_or_dtensor(name, x) if field in ("weight", "bias") else plain(name, x)
            options.check_reference(name)
            if x.dtype not in FLOATS:
                raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
            if x.device != labels.device:
                raise ValueError(f"{name} is on {x.device} but labels is on {labels.device}")
            if field in ("weight", "bias") and given.hidden is None:
                raise ValueError(f"{name} of shape {tuple(x.shape)} was given without ref_hidden")
        checked.append(x)
    hidden, ref_weight, ref_bias, logps = checked
    if hidden is None and options.needs_kl():
        given = "no reference" if logps is None else f"ref_logps of shape {tuple(logps.shape)}"
        raise ValueError(
            f"loss_type {list(options.loss_type)} compares whole distributions, of which log-probs of the labels are "
            f"not enough: give ref_hidden (and ref_weight, where the reference has a head of its own); got {given}"
        )
    if without_bias and hidden is None:
        options.check_reference("ref_bias")
        raise ValueError("ref_bias=False was given without ref_hidden")
    if logps is not None:
        if hidden is not None:
            raise ValueError("ref_hidden and ref_logps were both given: the reference has one source")
        per_sequence = (labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,)
        if logps.shape not in (per_sequence, labels.shape):
            raise ValueError(
                f"ref_logps must be per sequence, {per_sequence}, or per token, {tuple(labels.shape)}; "
                f"got shape {tuple(logps.shape)}"
            )
        if cu_seqlens is not None and logps.shape == per_sequence:
            logps = logps[:, None]
    if hidden is None:
        return Reference(None, None, None, logps)
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"ref_hidden must be laid out like hidden, [{', '.join(map(str, labels.shape))}, H]; "
            f"got shape {tuple(hidden.shape)}"
        )
    if ref_weight is None:
        weight = ref_weight = plain_or_dtensor("weight", weight)
        if hidden.shape[-1:] != weight.shape[-1:]:
            raise ValueError(
                f"ref_hidden has H = {hidden.shape[-1]} but weight has H = {weight.shape[-1]}: give ref_weight"
            )
    elif ref_weight.ndim != 2 or ref_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"ref_weight must be [V, H] with H = {hidden.shape[-1]} of ref_hidden; got shape {tuple(ref_weight.shape)}"
        )
    elif bias is not None and ref_bias is None and not without_bias:
        raise ValueError(
            "ref_weight was given without ref_bias, but the policy's head has a bias: give the reference's, or "
            "ref_bias=False where it has none"
        )
    if torch.float64 in (hidden.dtype, ref_weight.dtype) and hidden.dtype != ref_weight.dtype:
        raise TypeError(
            "fp64 is for checking: all of the reference's head and ref_hidden must be fp64 or none; got ref_hidden "
            f"{hidden.dtype}, its weight {ref_weight.dtype}"
        )
    if ref_bias is None and not without_bias:
        ref_bias = bias
    elif ref_bias is not None and ref_bias.shape != ref_weight.shape[:1]:
        raise ValueError(
            f"ref_bias must have shape ({ref_weight.shape[0]},), the rows of the reference's head; "
            f"got {tuple(ref_bias.shape)}"
        )
    return Reference(hidden, ref_weight, ref_bias, None)
