"""What is installed, what serves what, and whether every engine that can run here computes what it should.

Log-probs and gradients of a small head are compared with fp64, which takes about a second. The exit status is 1 where
one is off. The last lines are to paste into a bug report; there is no path and no name of yours among them.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..ops.engines import backends
from .checks import Check, checks
from .report import gpus, lines

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "deepspeed",
    "liger-kernel", "cut-cross-entropy", "unsloth", "unsloth-zoo", "bitsandbytes", "flash-attn", "vllm",
    "llamafactory", "ms-swift", "axolotl", "openrlhf", "torchtune", "nemo-rl", "rich", "matplotlib",
)  # fmt: skip
VARIABLES = (
    "FASTDPO_ENGINE", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_COMPILE_DISABLE",
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-check", dest="check", action="store_false", help="compute nothing, say what there is")


def installed() -> dict[str, str]:
    """Versions by package, of those that are there; from their metadata: nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with what it was built for


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical, {torch.backends.cpu.get_cpu_capability()}"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def machine() -> dict:
    return {
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "CPU": _cpu(),
        "memory": _memory(),
        "torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "the CPU alone",
        "GPUs": gpus(),
    }


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def remedies(found: dict, versions: dict[str, str]) -> Iterator[str]:
    """What would make it faster, or work."""
    if not found["native"]["available"]:
        why = found["native"]["reason"]
        yield f"The native extension is missing ({why}). Install a C++ compiler, then install fastdpo again."
    if torch.cuda.is_available() and not found["engines"]["triton"]["available"]:
        yield f"There is a GPU, but the Triton engine cannot run: {found['engines']['triton']['reason']}."
    if torch.cuda.is_available() and found["native"]["available"] and found["native"]["cuda_reason"]:
        yield f"The CUDA kernels of logits and losses cannot run: {found['native']['cuda_reason']}."
    for note in found["notes"]:
        yield f"{note}. Where something is off, go back to the tested release."
    if "trl" in versions and tuple(map(int, versions["trl"].split(".")[:2])) < (0, 24):
        yield f"patch_trl needs TRL 0.24 or newer; this is {versions['trl']}."
    for name in ("FASTDPO_ENGINE", "TRITON_INTERPRET"):
        if name in os.environ:
            yield f"{name}={os.environ[name]} is set: it chooses the engine. Unset it unless that is what you want."


def shown(check: Check) -> str:
    """One line."""
    name = f"{'ok ' if check.passed else 'OFF'}  {check.operation:24}  {check.engine:15}  {check.inputs:14}"
    if check.failed is not None:
        return f"{name}  {check.failed}"
    errors = [f"{key} {error:.1e} (at most {check.limits[key]:.0e})" for key, error in check.errors.items()]
    return f"{name}  {', '.join(errors)}"


def _state(engine: dict) -> str:
    return "can run" if engine["available"] else engine["reason"]


def to_paste(found: dict, versions: dict[str, str], results: list[Check] | None) -> Iterator[str]:
    yield f"fastdpo {found['versions']['fastdpo']}"
    yield ", ".join(f"{name} {number}" for name, number in versions.items())
    yield from lines(machine())
    native = found["native"]
    what = f"{native['isa']}, CUDA kernels for {', '.join(map(str, native['cuda_archs'])) or 'none'}"
    yield f"native extension: {what if native['available'] else native['reason']}"
    for name, engine in found["engines"].items():
        yield f"engine {name}: {_state(engine)}"
    yield f"linear_logps: {'; '.join(f'{device} {why}' for device, why in found['operations']['linear_logps'].items())}"
    yield f"forward kernel: {found['forward_kernel']}"
    yield from (f"note: {note}" for note in found["notes"])
    yield f"environment: {', '.join(f'{name}={value}' for name, value in variables().items()) or 'nothing set'}"
    if results is None:
        yield "self-check: not run"
        return
    off = [check for check in results if not check.passed]
    yield f"self-check: {len(results) - len(off)} of {len(results)} as they should be"
    yield from map(shown, off)


def run(args: argparse.Namespace) -> int:
    found, versions = backends(), installed()
    sections = {
        "machine": machine(),
        "installed": {"fastdpo": found["versions"]["fastdpo"], **versions},
        "environment variables": variables() or {"none": "of those that matter here"},
        "native": found["native"],
        "engines": {name: _state(engine) for name, engine in found["engines"].items()},
        "operations": found["operations"],
    }
    print("\n".join(lines(sections)))
    results = None
    if args.check:
        print("\nself-check against fp64: relative errors", flush=True)
        results = checks()
        print("\n".join(f"  {shown(check)}" for check in results))
    advice = list(remedies(found, versions))
    off = [check for check in results or () if not check.passed]
    if advice or off:
        print("\nwhat to do")
    for line in advice:
        print(f"  {line}")
    if off:
        print("  A result is OFF: do not train with it. Please report it, with the lines below.")
    print("\n----- to paste into a bug report -----")
    print("\n".join(to_paste(found, versions, results)))
    print("----- until here -----")
    return 1 if off else 0
