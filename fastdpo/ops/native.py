"""The native extension built from csrc/, if this installation has one, and why not otherwise.

Its functions take the structs of csrc/structs.h field by field by keyword. Tensors become pointers there, where their
type, device and layout are checked: nothing here knows an address.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path

import torch  # the extension joins the OpenMP pool that torch has loaded


def _load():
    try:
        return importlib.import_module(".._C", __package__), None  # ours, whatever this package is called
    except ImportError as error:
        return None, f"{build_info().get('reason') or error}"


@functools.cache
def build_info() -> dict:
    """What setup.py recorded: compiler, instruction sets, CUDA architectures, the reason for what is missing."""
    path = Path(__file__).parents[1] / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {"reason": "not built (running from a source tree?)"}


EXTENSION, REASON = _load()  # None where there is none, and then why


def available() -> bool:
    return EXTENSION is not None


@functools.cache
def cuda_problem(capability: tuple[int, int] | None = None) -> str | None:
    """Why the CUDA kernels cannot run here, on a GPU of that compute capability if given; None when they can."""
    if not available():
        return f"the native extension is missing ({REASON})"
    if not hasattr(EXTENSION, "cuda_logits_forward"):
        return f"built without CUDA kernels: {build_info().get('cuda_reason')}"
    built_with, served = EXTENSION.cuda_runtime_version(), EXTENSION.cuda_driver_version()
    if served == 0:
        return "no NVIDIA driver here"
    if served // 1000 < built_with // 1000:  # within a major version old drivers serve new runtimes
        return f"built with CUDA {_version(built_with)}; the driver serves {_version(served)}"
    if capability is not None and not serves(capability, build_info()["cuda_archs"], build_info()["cuda_ptx"]):
        return f"built for sm_{', sm_'.join(map(str, build_info()['cuda_archs']))}; this GPU is {capability}"
    return None


def launch(name: str, device: torch.device, *, what: str = "", **fields) -> None:
    """Calls the extension's `name` on the current stream of a CUDA device. RuntimeError where the launch fails."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        error = getattr(EXTENSION, name)(device=device.index, stream=stream, **fields)
    if error:
        raise RuntimeError(f"{name} on {device}{what}: CUDA error {error}, {EXTENSION.cuda_error_text(error)}")


def serves(capability: tuple[int, int], archs: list[int], ptx: list[int]) -> bool:
    """Machine code runs on its own major version from its minor version on; PTX on all that is newer."""
    gpu = 10 * capability[0] + capability[1]
    return any(gpu >= arch for arch in ptx) or any(arch // 10 == capability[0] and arch <= gpu for arch in archs)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
