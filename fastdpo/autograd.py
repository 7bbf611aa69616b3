"""What the autograd Functions share: how they are called, and that their backward is not differentiated itself."""

from __future__ import annotations

import functools

import torch

from .tensors import inside_a_transform, refuse_transforms

NO_SECOND_DERIVATIVE = "fastdpo's functions are once differentiable: their gradients have no gradient"


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


def no_second_derivative(ctx, *_):
    """The backward of an operator that is itself a backward."""
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def once_differentiable(backward):
    """Decorates a Function's backward: runs it without grad mode, and makes double backward raise RuntimeError.

    torch's decorator of the same name raises only where the upstream gradient requires grad; after
    ``logps.sum()`` with ``create_graph=True`` it does not, and a gradient penalty would vanish without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *upstream):
        if not torch.compiler.is_compiling():
            for x in upstream:
                if x is not None and torch._C._functorch.is_legacy_batchedtensor(x):
                    raise inside_a_transform(ctx._forward_cls.of)
            refuse_transforms(ctx._forward_cls.of, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        inputs = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
        return tuple(None if g is None else _FirstDerivative.apply(g, *inputs) for g in gradients)

    return wrapper


@torch._disable_dynamo
def uncompiled(function, *arguments):
    """`function(*arguments)`, where torch.compile breaks its graph: it cannot look into the engines' loops."""
    return function(*arguments)


def eager(function, *arguments):
    """`uncompiled`, which imports torch._dynamo, only inside torch.compile."""
    return uncompiled(function, *arguments) if torch.compiler.is_compiling() else function(*arguments)


def apply(function: type[torch.autograd.Function], *arguments):
    return eager(function.apply, *arguments)
