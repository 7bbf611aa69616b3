"""Which tensors may enter: those that keep their values in strided memory, outside of torch.func's transforms. The rest
is refused by name, with what to do. And how they lie for engines.

Engines, and kernels most of all, take an address and strides: a tensor that is not what it seems has 0 for an address,
which they read as "absent", or values that are not the ones at its address.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

_TRACED = (FakeTensor, FunctionalTensor)  # without values; their calls become operators
_TRACERS = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake tensors, make_fx, functionalization
_INSTEAD = {
    "DTensor": "its full_tensor(), or its to_local() of what is by row; linear_logps, linear_token_stats and "
    "linear_dpo_loss take hidden, labels and the head as DTensors",
    "UninitializedParameter": "one whose shape is known",
}
_ANY_INSTEAD = "a plain tensor of its values, such as its dequantize(), or as_subclass(torch.Tensor) where that is one"


def plain(name: str, x) -> Tensor:
    """`x`, whose values lie in memory where its address and strides say, or TypeError naming the argument.

    A subclass that adds nothing to how torch computes is taken as the tensor it is; gradients return to it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")
    if type(x) not in (Tensor, torch.nn.Parameter):
        if isinstance(x, _TRACED):
            return x
        x = _of_subclass(name, x)
    if x.is_nested:
        raise _refusal(name, "a nested tensor", "its to_padded_tensor(...), or values() with cu_seqlens")
    if x.layout != torch.strided:
        raise _refusal(name, f"a tensor of layout {x.layout}", "its to_dense()")
    if x.is_quantized:
        raise _refusal(name, f"a quantized tensor, {x.dtype}", "its dequantize()")
    if torch.compiler.is_compiling():
        return x
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        instead = "plain tensors, differentiated by torch.autograd"
        raise _refusal(name, "a tensor inside a torch.func transform", instead)
    if x._is_zerotensor():
        return x.clone()
    if x.numel() and x.device.type != "meta" and x.data_ptr() == 0:
        what = f"a tensor of shape {tuple(x.shape)} whose storage was released (a sharded parameter, perhaps)"
        raise _refusal(name, what, "it gathered")
    return x


def plain_or_none(name: str, x) -> Tensor | None:
    return None if x is None else plain(name, x)


def _of_subclass(name: str, x: Tensor) -> Tensor:
    kind = type(x)
    if kind.__name__ == "AsyncCollectiveTensor":  # of a collective under way: any copy waits for it
        return plain(name, x.clone())
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    functions = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or function not in functions:
        what = f"a {kind.__module__}.{kind.__name__}, whose operations or storage are its own"
        raise _refusal(name, what, _INSTEAD.get(kind.__name__, _ANY_INSTEAD))
    return x if isinstance(x, torch.nn.Parameter) or torch.compiler.is_compiling() else x.as_subclass(Tensor)


def _refusal(name: str, what: str, instead: str) -> TypeError:
    return TypeError(f"{name} must be a plain strided tensor; got {what}: pass {instead}")


def traced(*tensors: Tensor | None) -> bool:
    """Whether the call is recorded, or followed by shape, instead of computed: values cannot be read then."""
    if torch.compiler.is_compiling():
        return True
    for key in _TRACERS:
        if torch._C._get_dispatch_mode(key) is not None:
            return True
    for x in tensors:
        if x is not None and (isinstance(x, _TRACED) or x.is_meta):
            return True
    return False


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
        raise inside_a_transform(name)
    if forward_mode and (torch.compiler.is_compiling() or any(_has_tangent(x) for x in tensors)):
        # torch.compile cannot tell which tensors have one
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.autograd.forward_ad.dual_level): take its gradient with "
            "backward() or torch.autograd.grad"
        )


def inside_a_transform(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} does not run inside torch.func's transforms (vmap, grad, vjp, jvp, jacrev, hessian, ...) or a "
        "batched backward (is_grads_batched=True, vectorize=True): take its gradient with backward() or "
        "torch.autograd.grad, one upstream gradient at a time; a batch goes into the arguments' own dimensions"
    )


@torch._disable_dynamo  # which would answer for a fake tensor in the frames it still compiles
def _has_tangent(x) -> bool:
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


# Strides of 0 (expand), steps, permuted dimensions and the negative bit (of views such as ``x.conj().imag``) end here.


def contiguous(x: Tensor | None) -> Tensor | None:
    if x is None or (x.is_contiguous() and not x.is_neg() and not x._is_zerotensor()):
        return x
    return x.clone() if x._is_zerotensor() else x.resolve_neg().contiguous()


def in_rows(x: Tensor, *, apart: bool = False) -> Tensor:
    """`x` with unit stride along its last dimension; with `apart`, [n, m] whose rows do not overlap either."""
    x = x.resolve_neg()
    if x.stride(-1) != 1:
        x = x.contiguous()
        if x.stride(-1) != 1:  # one column, whose stride `contiguous` leaves as it was
            x = x.as_strided(x.shape, (*x.stride()[:-1], 1))
    return x.contiguous() if apart and x.shape[0] > 1 and x.stride(0) < x.shape[1] else x
