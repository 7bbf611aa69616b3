"""What the autograd Functions share: how they are called, and what they refuse by name: torch.func's transforms,
forward-mode AD, and to have their backward differentiated."""

from __future__ import annotations

import functools

import torch
from torch.autograd import forward_ad

from .tensors import TRACED

NO_SECOND_DERIVATIVE = "fastdpo's functions are once differentiable: their gradients have no gradient"


def _inside() -> tuple[bool, bool]:
    """Whether a transform of torch.func is on, and whether a level of forward-mode AD is."""
    return torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0


# torch.compiler.assume_constant_result's mark: torch.compile cannot look into it. It guards on transforms by itself,
# not on levels, for which the operators ask again. Calling it would import torch._dynamo whenever fastdpo is imported.
_inside._dynamo_marked_constant = True


def refuse_transforms(name: str, *tensors) -> None:
    """Raises inside a transform of torch.func and for tensors with a tangent: nothing here can be followed there, and
    torch.library's operators would answer with a tangent of zero."""
    transform, forward_mode = _inside()
    if transform:
        raise _inside_a_transform(name)
    if forward_mode and (torch.compiler.is_compiling() or any(_has_tangent(x) for x in tensors)):
        # torch.compile cannot tell which tensors have one
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.autograd.forward_ad.dual_level): take its gradient with "
            "backward() or torch.autograd.grad"
        )


def _inside_a_transform(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} does not run inside torch.func's transforms (vmap, grad, vjp, jvp, jacrev, hessian, ...) or a "
        "batched backward (is_grads_batched=True, vectorize=True): take its gradient with backward() or "
        "torch.autograd.grad, one upstream gradient at a time; a batch goes into the arguments' own dimensions"
    )


@torch._disable_dynamo  # which would answer for a fake tensor in the frames it still compiles
def _has_tangent(x) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


class Function(torch.autograd.Function):
    """`of` names what the user called."""

    of = "fastdpo"

    @classmethod
    def apply(cls, *arguments):
        refuse_transforms(cls.of, *arguments)
        return super().apply(*arguments)


class _FirstDerivative(torch.autograd.Function):
    """Ties a gradient to the tensors it is a function of, so that differentiating it is noticed."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def once_differentiable(backward):
    """Decorates a Function's backward: runs it without grad mode, and makes double backward raise RuntimeError.

    torch's decorator of the same name raises only where the upstream gradient requires grad; after
    ``logps.sum()`` with ``create_graph=True`` it does not, and a gradient penalty would vanish without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *upstream):
        if not torch.compiler.is_compiling():
            if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in upstream):
                raise _inside_a_transform(ctx._forward_cls.of)
            refuse_transforms(ctx._forward_cls.of, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        inputs = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
        return tuple(None if g is None else _FirstDerivative.apply(g, *inputs) for g in gradients)

    return wrapper


_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake tensors, make_fx, functionalization


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether the call is recorded, or followed by shape, instead of computed: values cannot be read then."""
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS):
        return True
    return any(isinstance(x, TRACED) or (x is not None and x.device.type == "meta") for x in tensors)


@torch._disable_dynamo
def _uncompiled(function, *arguments):
    return function.apply(*arguments)


def apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, where torch.compile breaks its graph: it cannot look into the engines' loops."""
    return _uncompiled(function, *arguments) if torch.compiler.is_compiling() else function.apply(*arguments)
