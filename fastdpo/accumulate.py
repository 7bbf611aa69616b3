"""The head's gradient, added in the backward to where gradients are kept: no second ``[V, H]`` beside it.

"grad"        what autograd adds to; the first gradient of all is returned, and becomes `weight.grad` as it is
"main_grad"   Megatron's fp32 sums; nothing is returned, so that `weight.grad` stays as it was

A backward that fails in the middle, out of memory say, has added a part by then: who tries the batch again puts back
what was there, or begins the step anew.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_accumulates(weight: Tensor, into: str | None) -> None:
    """ValueError or TypeError unless the backward of a head with this weight can add its gradient there."""
    if into is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return
    if not weight.is_leaf:
        raise ValueError(
            f"accumulate_into={into!r} needs a weight that is a leaf, a parameter itself; got one that "
            f"{weight.grad_fn.name()} has made"
        )
    if into == "main_grad" and not isinstance(getattr(weight, "main_grad", None), Tensor):
        raise ValueError("accumulate_into='main_grad' needs a tensor weight.main_grad; this weight has none")
    if _check_place(weight, into) is None and not weight.is_contiguous():  # the first gradient takes weight's layout
        raise ValueError(
            f"accumulate_into={into!r} needs a contiguous weight, or weight.{into} to be there; got strides "
            f"{weight.stride()} of shape {tuple(weight.shape)}"
        )


def _check_place(weight: Tensor, into: str) -> Tensor | None:
    place = getattr(weight, into, None)
    if place is None:
        return None
    plain = type(place) in (Tensor, torch.nn.Parameter) and place.layout == torch.strided
    if not plain or place.shape != weight.shape or place.device != weight.device or not place.is_contiguous():
        what = f"a {type(place).__name__} of shape {tuple(place.shape)} on {place.device}"
        raise ValueError(f"accumulate_into={into!r} needs weight.{into} contiguous and like weight; got {what}")
    return place


def destination(ctx, weight: Tensor) -> Tensor | None:
    """What this backward adds the gradient of `weight` to; None: it is returned, as where it has no place yet, or where
    torch.autograd.grad asks for it and keeps it out of `grad`."""
    if ctx.accumulate_into is None:
        return None
    try:
        kept = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError:  # "a leaf node ... currently running autograd.grad()"
        kept = False
    return _check_place(weight, ctx.accumulate_into) if kept else None


def nothing_left(into: str, weight: Tensor) -> Tensor | None:
    """What autograd still adds: zeros without memory to `grad`, so that hooks on its accumulation run."""
    return weight.new_zeros(()).expand(weight.shape) if into == "grad" else None
