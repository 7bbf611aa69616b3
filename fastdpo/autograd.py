"""What the autograd Functions share: how they are called, and a backward that refuses to be differentiated."""

from __future__ import annotations

import functools

import torch

from .tensors import TRACED

NO_SECOND_DERIVATIVE = "fastdpo's functions are once differentiable: their gradients have no gradient"


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
