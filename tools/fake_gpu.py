"""A GPU that is not there: public calls on tensors of `device="cuda"` without storage go through the whole host path,
and what would be launched is recorded.

    with FakeGpu(86) as gpu:
        hidden = gpu.empty(8192, 4096, dtype=torch.bfloat16).requires_grad_()
        fastdpo.linear_logps(hidden, weight, labels)
    gpu.launches

torch without CUDA builds no graph of such tensors, so that a call's backward runs right after its forward, with
upstream gradients for all that it returned. An address is as a caching allocator gives it, aligned to 512 bytes, plus
the offset of a view.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastdpo.costs.gpus import MULTIPROCESSORS
from fastdpo.ops import operators
from fastdpo.ops.triton.launch import Recorder, Target

STORAGE = 1 << 40
_CUDA, _META = 1, 14  # c10::DeviceType


def _let_torch_name_cuda() -> None:
    """torch without CUDA has nothing that makes a CUDA device the current one, and indexing a tensor asks for it: here
    that of the meta device takes its place, which does nothing."""
    torch._C._ensureCUDADeviceGuardSet()  # a torch with CUDA and no GPU
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 32).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_CUDA] = guards[_CUDA] or guards[_META]


def _address(x: FakeTensor) -> int:
    return STORAGE + x.storage_offset() * x.element_size()


class _Context:
    """What `torch.autograd.Function` hands from a forward to its backward."""

    def __init__(self, function: type, arguments: tuple):
        self._forward_cls = function
        self.needs_input_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        self.saved_tensors: tuple = ()

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _apply(function, *arguments):
    context = _Context(function, arguments)
    with torch.no_grad():
        results = function.forward(context, *arguments)
        if any(context.needs_input_grad):
            function.backward(context, *(None if x is None else torch.empty_like(x) for x in results))
    return results


class FakeGpu:
    """Of this compute capability, with its usual number of multiprocessors."""

    def __init__(self, capability: int, multiprocessors: int | None = None):
        self.target = Target(capability, multiprocessors or MULTIPROCESSORS[capability].count)
        self.launches: list[tuple] = []

    def __enter__(self) -> FakeGpu:
        _let_torch_name_cuda()
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address, create=True))
            stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(_apply)))
            # tensors without values are otherwise answered by operators, which only follow shapes
            stack.enter_context(mock.patch.object(operators, "_is_operator", lambda *_: False))
            self.launches = stack.enter_context(Recorder(self.target))
            stack.enter_context(FakeTensorMode())
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    @staticmethod
    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")
