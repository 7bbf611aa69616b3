"""What may enter: tensors that keep their values in strided memory. The rest is refused by name, with what to do.

Engines, and kernels most of all, take an address and strides: a tensor that is not what it seems has 0 for an address,
which they read as "absent", or values that are not the ones at its address.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

TRACED = (FakeTensor, FunctionalTensor)  # without values; their calls become operators
_INSTEAD = {
    "DTensor": "full_tensor(), or its to_local() with vocab_group= where the head is split along the vocabulary",
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
        if isinstance(x, TRACED):
            return x
        x = _of_subclass(name, x)
    if x.is_nested:
        raise _refusal(name, "a nested tensor", "its to_padded_tensor(...), or values() with cu_seqlens")
    if x.layout != torch.strided:
        raise _refusal(name, f"a tensor of layout {x.layout}", "its to_dense()")
    if x.is_quantized:
        raise _refusal(name, f"a quantized tensor, {x.dtype}", "its dequantize()")
    return x if torch.compiler.is_compiling() else _stored(name, x)


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


def _stored(name: str, x: Tensor) -> Tensor:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise _refusal(
            name, "a tensor inside a torch.func transform", "plain tensors, differentiated by torch.autograd"
        )
    if x._is_zerotensor():
        return x.clone()
    if x.numel() and x.device.type != "meta" and x.data_ptr() == 0:
        what = f"a tensor of shape {tuple(x.shape)} whose storage was released (a sharded parameter, perhaps)"
        raise _refusal(name, what, "it gathered")
    return x


def _refusal(name: str, what: str, instead: str) -> TypeError:
    return TypeError(f"{name} must be a plain strided tensor; got {what}: pass {instead}")
