"""The lm_head that TRL's fused forward reads: `lm_head.weight` is taken and the module never called, so that what FSDP
hangs on it does not run.

FSDP's hooks on a head that is a group of its own, or one with the last norm, gather its weight, gather it again for the
backward and average its gradient. TRL's `weight.full_tensor()` leaves every rank with its slice of its own gradient. So
such a head is called here, and log-probs are computed in its forward.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..models.wrappers import FSDP1, is_dtensor, refuse_sharded, scored_module, whole

Scores = TypeVar("Scores", bound=tuple)


class _State(threading.local):
    head: nn.Module | None = None  # of the fused forward that this thread is in, where it is split


_STATE = _State()


def telling_its_head(add_fused_lm_head, _):
    """TRL's function that gives a model its fused forward; the model then tells of its head where it is split."""

    @functools.wraps(add_fused_lm_head)
    def wrapper(model, *args, **kwargs):
        add_fused_lm_head(model, *args, **kwargs)
        fused = model.forward.__func__

        @functools.wraps(fused)
        def forward(self, *args, **kwargs):
            return _telling(self, fused, self, *args, **kwargs)

        model.forward = MethodType(forward, model)

    return wrapper


def telling_its_student(compute_loss, _):
    """`DistillationTrainer._compute_loss`, which reads the student's head; the same of it."""

    @functools.wraps(compute_loss)
    def wrapper(self, unwrapped_student, *args, **kwargs):
        return _telling(unwrapped_student, compute_loss, self, unwrapped_student, *args, **kwargs)

    return wrapper


def _telling(model: nn.Module, function, *args, **kwargs):
    head = model.get_output_embeddings()
    if not (is_of_fsdp(head) or is_dtensor(head.weight)):
        return function(*args, **kwargs)
    if not is_of_fsdp(head):  # part of a larger group, whose forward may not be running
        refuse_sharded(head, head.weight)
    return _during(head, function, *args, **kwargs)


@torch._disable_dynamo  # it cannot write to a threading.local
def _during(head: nn.Module, function, *args, **kwargs):
    outer = _STATE.head
    try:
        _STATE.head = head
        return function(*args, **kwargs)
    finally:
        _STATE.head = outer


def split_head() -> nn.Module | None:
    """The head of the fused forward that is running, where it is split; None for a forward made before patching."""
    return None if torch.compiler.is_compiling() else _STATE.head


def is_of_fsdp(head: nn.Module) -> bool:
    """Whether FSDP was applied to the head itself, and its hooks gather."""
    return FSDP1 in head._modules or any(kind.__name__ == "FSDPModule" for kind in type(head).__mro__)


def in_forward_of(head: nn.Module, hidden: Tensor, score: Callable[[Tensor, Tensor, Tensor | None], Scores]) -> Scores:
    """``score(hidden, weight, bias)``, a NamedTuple of tensors or None, inside of the forward of a head to which FSDP
    was applied; there a DTensor is split by tensor parallelism alone, whose ranks have the same gradient."""
    module, scored = scored_module(head), []

    def forward(hidden: Tensor) -> tuple[Tensor, ...]:
        bias = None if module.bias is None else whole(module.bias)
        scores = score(hidden, whole(module.weight), bias)
        # FSDP hangs the gathering before the backward on what takes a gradient and is not a view; what it returns of it
        # may be rounded
        scored.append(type(scores)(*(x.clone() if _takes_gradient(x) else x for x in scores)))
        return tuple(filter(_takes_gradient, scored[0]))

    before = module.__dict__.get("forward")
    try:
        module.__dict__["forward"] = forward
        head(hidden)
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before
    return scored[0]


def _takes_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def refuse_unreduced(weight: Tensor) -> None:
    """Raises for what TRL has gathered of a DTensor in a forward that tells nothing of its head, where a gradient of it
    would be lost."""
    made = weight.grad_fn
    if made is not None and "ToCopy" in type(made).__name__:  # gathered, then cast
        made = made.next_functions[0][0]
    if torch.is_grad_enabled() and type(made).__name__ == "_ToTorchTensorBackward" and split_head() is None:
        raise NotImplementedError(
            "an lm_head that is split (a DTensor), of a trainer that was made before patch_trl was called: its "
            "gradient would not be reduced over ranks; call patch_trl first, at the top of the script"
        )


def regathering(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function`, for heads that ZeRO-3 gathers for the forward only: when the backward comes they are split again."""

    class Regathering(function):
        @staticmethod
        def backward(ctx, *grads):
            # ZeRO-3 splits a parameter in place: what was saved is the parameter, with its ds_* attributes
            split = [x for x in ctx.saved_tensors if hasattr(x, "ds_status")]
            if not split:
                return function.backward(ctx, *grads)
            with sys.modules["trl.trainer.utils"].maybe_gather_lm_head_ctx(*split):
                return function.backward(ctx, *grads)

    return Regathering
