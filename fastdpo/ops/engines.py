"""Which engine serves a call, in one place."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from . import entries, native, reference
from .by_token import by_row
from .cpu import backward as cpu_backward
from .cpu import forward as cpu_forward
from .cpu import library
from .divergence import by_token as divergence_by_token
from .divergence import cpu as divergence_cpu
from .divergence import reference as divergence_reference
from .divergence.problem import DivergenceEngine
from .problem import Engine
from .selective import cpu as cpu_logits
from .selective import cuda as cuda_logits
from .triton.special import release

ENGINES = ("reference", "cpu", "triton")
TRITON_VERSIONS = ((3, 6), (3, 9))  # whose machine code is checked; an older one than the first does not serve
NEWEST_TORCH = (2, 15)  # that the tests ran with: tests/versions.py
OLDEST_GPU = (8, 0)
_LOGITS = {
    "reference": (reference.logits_forward, reference.logits_backward),
    "cpu": (cpu_logits.forward, cpu_logits.backward),
    "cuda": (cuda_logits.forward, cuda_logits.backward),
}
_BY_TOKEN = {
    "reference": Engine("reference", reference.forward, reference.backward),
    "cpu": Engine("cpu", cpu_forward.forward, cpu_backward.backward),
}

_DIVERGENCE_BY_TOKEN = {
    "reference": DivergenceEngine("reference", divergence_reference.forward, divergence_reference.backward),
    "cpu": DivergenceEngine("cpu", divergence_cpu.forward, divergence_cpu.backward),
}
_DIVERGENCE_BY_TOKEN["triton"] = _DIVERGENCE_BY_TOKEN["reference"]


def _unavailable(engine: str, device: torch.device, interpret: str | None) -> str | None:
    """Why `engine` cannot serve tensors on `device`, or None when it can; `interpret`: TRITON_INTERPRET."""
    if engine == "reference":
        return None
    if engine == "cpu":
        if device.type != "cpu":
            return f"the cpu engine takes CPU tensors, not {device.type}"
        return None if native.available() else f"the native extension is missing ({native.REASON})"
    interpreted = device.type == "cpu" and interpret == "1"
    if device.type != "cuda" and not interpreted:
        hint = ", unless TRITON_INTERPRET=1" if device.type == "cpu" else ""
        return f"the triton engine takes CUDA tensors, not {device.type}{hint}"
    if torch.version.hip and not interpreted:
        return "the Triton kernels were never tested on an AMD GPU, whose shared memory their tiles exceed"
    version = _triton_version()
    if version is None:
        return "Triton cannot be imported"
    if release(version) < TRITON_VERSIONS[0]:
        return f"Triton {version} is older than {_text(TRITON_VERSIONS[0])}"
    if not interpreted and torch.cuda.is_initialized() and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"the GPU's compute capability is below {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    return None


def _engine_reasons() -> dict[str, str | None]:
    """Why each engine cannot run on this machine, or None where it can."""
    cpu, cuda, interpret = torch.device("cpu"), torch.device("cuda"), os.environ.get("TRITON_INTERPRET")
    reasons = {name: _unavailable(name, cpu, interpret) for name in ENGINES}
    if torch.cuda.is_available():
        reasons["triton"] = _unavailable("triton", cuda, interpret)
    elif reasons["triton"] is not None and _unavailable("triton", cuda, interpret) is None:
        reasons["triton"] = "no GPU here; TRITON_INTERPRET=1 serves CPU tensors"
    return reasons


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def _unchecked(engine: str, device: torch.device) -> str:
    """What to know where a release of Triton compiles whose machine code nobody has checked."""
    version = _triton_version()
    if engine != "triton" or device.type != "cuda" or release(version) in TRITON_VERSIONS:
        return ""
    which = "newer than any" if release(version) > TRITON_VERSIONS[-1] else "none of those"
    return f"; Triton {version} is {which} whose machine code was checked, {' and '.join(map(_text, TRITON_VERSIONS))}"


def _notes() -> list[str]:
    """What to know before trusting what serves: releases that came after the tests ran."""
    tested = (("torch", torch.__version__, NEWEST_TORCH), ("triton", _triton_version(), TRITON_VERSIONS[-1]))
    return [
        f"{name} {version} is newer than {_text(newest)}, the newest that was tested: nobody has compared its results "
        "yet but `python -m fastdpo doctor` here"
        for name, version, newest in tested
        if version is not None and release(version) > newest
    ]


@cache
def _triton_version() -> str | None:
    try:  # not at import: it takes a second, and the CPU does without
        import triton

        return triton.__version__
    except Exception:  # built for another Python or driver, it raises anything
        return None


def _choose(device: torch.device, dtype: torch.dtype, forced: str | None, interpret: str | None) -> tuple[str, str]:
    """(engine, why)."""
    if forced:
        if forced not in ENGINES:
            raise ValueError(f"FASTDPO_ENGINE must be one of {', '.join(ENGINES)}; got {forced!r}")
        problem = _unavailable(forced, device, interpret)
        if problem:
            raise RuntimeError(f"FASTDPO_ENGINE={forced} cannot run here: {problem}")
        if dtype != torch.float64:
            return forced, "FASTDPO_ENGINE" + _unchecked(forced, device)
    if dtype == torch.float64:
        return "reference", "fp64 inputs are computed in fp64"
    wanted = "cpu" if device.type == "cpu" else "triton"
    problem = _unavailable(wanted, device, interpret)
    if problem is not None:
        return "reference", problem
    return wanted, f"fastest for {device.type}" + _unchecked(wanted, device)


@cache
def engine_for(device: torch.device, dtype: torch.dtype, forced: str | None, interpret: str | None) -> Engine:
    """Which engine serves tensors of this device and type, by rows; `forced` and `interpret` are the values of
    FASTDPO_ENGINE and TRITON_INTERPRET."""
    name, _ = _choose(device, dtype, forced, interpret)
    if name == "triton":
        from .triton import backward, forward

        return Engine("triton", forward.forward, backward.backward)
    return by_row(_BY_TOKEN[name])


@cache
def divergence_engine_for(
    device: torch.device, dtype: torch.dtype, forced: str | None, interpret: str | None
) -> DivergenceEngine:
    """The same for the divergence of two heads."""
    name, _ = _choose(device, dtype, forced, interpret)
    if name == "triton":
        from .triton.divergence import backward, forward

        return DivergenceEngine("triton", forward.forward, backward.backward)
    return divergence_by_token.by_row(_DIVERGENCE_BY_TOKEN[name])


def divergence_engine(device: torch.device, dtype: torch.dtype) -> DivergenceEngine:
    """Which serves such tensors now."""
    forced, interpret = os.environ.get("FASTDPO_ENGINE"), os.environ.get("TRITON_INTERPRET")
    return divergence_engine_for(device, dtype, forced, interpret)


def entries_of(engine: Engine):
    """The module of this engine's `logits` and `backward` of entries: entries.py."""
    if engine.name == "triton":
        from .triton import entries as triton_entries

        return triton_entries
    return entries


def engine_of(hidden: torch.Tensor) -> Engine:
    """Which serves these hidden states now."""
    return engine_for(hidden.device, hidden.dtype, os.environ.get("FASTDPO_ENGINE"), os.environ.get("TRITON_INTERPRET"))


def _choose_logits(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(cpu, cuda or reference, why) for logits -> logps. CUDA tensors need no Triton here; a forced reference holds."""
    forced = os.environ.get("FASTDPO_ENGINE")
    engine, why = _choose(device, dtype, forced, os.environ.get("TRITON_INTERPRET"))
    if dtype == torch.float64 or device.type not in ("cpu", "cuda") or forced == "reference":
        return "reference", why
    if device.type == "cpu":
        return (engine, why) if engine != "triton" else ("reference", "the triton engine starts from hidden states")
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_initialized() else None
    problem = native.cuda_problem(capability)
    return ("cuda", f"fastest for {device.type}") if problem is None else ("reference", problem)


def logits_engine(device: torch.device, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(forward, backward) from logits to logps for tensors of this device and type."""
    return _LOGITS[_choose_logits(device, dtype)[0]]


def _devices() -> list[str]:
    """Those that may differ; a GPU's capability is not asked for before the process uses it."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return ["cpu", "cuda", *(f"cuda:{index}" for index in range(count) if count > 1)]


def _cpu_products() -> str:
    of_bf16 = ""
    if library.USES_BF16 or library.OWN_BF16:
        of_bf16 = f"; bf16 {'MKL' if library.USES_BF16 else 'csrc'} in the processor's units"
    return f"{library.NAME}{of_bf16}; few or listed rows csrc"


def backends() -> dict[str, Any]:
    """What this machine has and which engine each operation uses on it, with the reason.

    Returns a dict of plain values with the keys ``versions``, ``cpu``, ``native`` (the extension built from csrc/:
    ``available``, ``reason`` when not, ``isa``, ``cuda_archs``, ``cuda_reason`` where its CUDA kernels cannot run,
    ...), ``engines`` (``available`` and ``reason`` of each), ``operations`` (per operation and device type, of several
    GPUs in use per device: the engine and why), ``forward_kernel`` (of the Triton engine: which one serves what, and
    why) and ``notes`` (torch or Triton newer than any that was tested, a line each). Raises nothing, and starts no GPU
    context.
    """
    from .._version import __version__

    info = native.build_info()
    extension = native.EXTENSION
    slower = "logits folds, routing and losses run in plain torch: correct, several times slower"
    operations, devices = {}, _devices()
    for operation in ("linear_logps", "linear_token_stats", "linear_dpo_loss", "selective_log_softmax"):
        operations[operation] = {}
        for device in devices:
            try:
                if operation == "selective_log_softmax":
                    engine, why = _choose_logits(torch.device(device), torch.float32)
                else:
                    forced, interpret = os.environ.get("FASTDPO_ENGINE"), os.environ.get("TRITON_INTERPRET")
                    engine, why = _choose(torch.device(device), torch.float32, forced, interpret)
            except (RuntimeError, ValueError) as error:
                engine, why = "none", str(error)
            operations[operation][device] = f"{engine} ({why})"
    from .preference import templates as preference_native
    from .triton import special

    operations["preference_loss"] = {}
    for device in devices:
        problem = preference_native.problem(torch.device(device), torch.float32)
        found = "native templates" if problem is None else f"reference ({problem})"
        operations["preference_loss"][device] = found
    return {
        "versions": {
            "fastdpo": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "triton": _triton_version(),
        },
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "matrix products": _cpu_products() if extension else "torch.mm",
        },
        "native": {
            "available": native.available(),
            "reason": None if native.available() else f"{native.REASON}; {slower}",
            "isa": extension.isa() if extension else None,
            "threads": extension.parallel_backend() if extension else None,
            "compiler": info.get("compiler"),
            "cuda_archs": info.get("cuda_archs", []),
            "cuda_reason": native.cuda_problem(),
        },
        "engines": {name: {"available": why is None, "reason": why} for name, why in _engine_reasons().items()},
        "operations": operations,
        "forward_kernel": special.report(_triton_version()),
        "notes": _notes(),
    }
