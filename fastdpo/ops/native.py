"""The native extension built from csrc/, if this installation has one, and why not otherwise."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@functools.cache
def _load():
    import torch  # noqa: F401  the extension joins the OpenMP pool that torch has loaded

    try:
        return importlib.import_module("fastdpo._C"), None
    except ImportError as error:
        return None, f"{build_info().get('reason') or error}"


def extension():
    """The extension module; only for callers that have seen `available()`."""
    return _load()[0]


def address(x: Tensor | None, dtype: torch.dtype | None = None, *, device: str = "cpu", rows: bool = False) -> int:
    """Where native code finds `x`, contiguous or, with `rows`, [n, m] with unit stride along m; 0 for None alone.

    RuntimeError for what would be misread there: the one way from a tensor to a pointer.
    """
    if x is None:
        return 0
    pointer = x.data_ptr()
    here = x.is_cpu if device == "cpu" else x.device.type == device
    in_place = x.is_contiguous() or (rows and (x.stride(-1) == 1 or x.shape[-1] == 1))
    if here and in_place and not x.is_neg() and (pointer or not x.numel()) and (dtype is None or x.dtype is dtype):
        return pointer
    raise RuntimeError(
        f"native code for {device} would misread a tensor of type {type(x).__name__}, {x.dtype} on {x.device}, shape "
        f"{tuple(x.shape)}, strides {x.stride()}, at {pointer:#x}" + ("" if dtype is None else f" as {dtype}")
    )


def available() -> bool:
    return _load()[0] is not None


def reason() -> str | None:
    """Why there is no extension, or None."""
    return _load()[1]


@functools.cache
def build_info() -> dict:
    """What setup.py recorded: compiler, instruction sets, CUDA architectures, the reason for what is missing."""
    path = Path(__file__).parents[1] / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {"reason": "not built (running from a source tree?)"}


@functools.cache
def cuda_problem(capability: tuple[int, int] | None = None) -> str | None:
    """Why the CUDA kernels cannot run here, on a GPU of that compute capability if given; None when they can."""
    if not available():
        return f"the native extension is missing ({reason()})"
    if not hasattr(extension(), "cuda_logits_forward"):
        return f"built without CUDA kernels: {build_info().get('cuda_reason')}"
    built_with, served = extension().cuda_runtime_version(), extension().cuda_driver_version()
    if served == 0:
        return "no NVIDIA driver here"
    if served // 1000 < built_with // 1000:  # within a major version old drivers serve new runtimes
        return f"built with CUDA {_version(built_with)}; the driver serves {_version(served)}"
    if capability is not None and not serves(capability, build_info()["cuda_archs"], build_info()["cuda_ptx"]):
        return f"built for sm_{', sm_'.join(map(str, build_info()['cuda_archs']))}; this GPU is {capability}"
    return None


def launch(name: str, device, *arguments, what: str = "") -> None:
    """Calls the extension's `name` on the current stream of a CUDA device. RuntimeError where the launch fails."""
    import torch

    with torch.cuda.device(device):
        error = getattr(extension(), name)(*arguments, device.index, torch.cuda.current_stream().cuda_stream)
    if error:
        text = extension().cuda_error_text(error)
        raise RuntimeError(f"{name} on {device}{what}: CUDA error {error}, {text}")


def serves(capability: tuple[int, int], archs: list[int], ptx: int) -> bool:
    """Machine code runs on its own major version from its minor version on; PTX on all that is newer."""
    gpu = 10 * capability[0] + capability[1]
    return gpu >= ptx or any(arch // 10 == capability[0] and arch <= gpu for arch in archs)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
