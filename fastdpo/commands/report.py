"""`python -m fastdpo`: what the library found on this machine, and which engine serves each operation."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

import torch

from ..ops.engines import backends


def gpus() -> dict[str, str] | str:
    """One entry per GPU that torch can use, or the reason why there is none."""
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        return "none found" if built_for else "none: this torch is built for the CPU only"
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"GPU {index}"] = f"{properties.name}, capability {capability}, {memory}"
    return found


def as_text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def lines(tree: dict, indent: int = 0) -> Iterator[str]:
    """A nested dict as indented text, whatever its keys are; values of one dict are aligned."""
    width = max((len(str(key)) for key, value in tree.items() if not isinstance(value, dict)), default=0)
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{'  ' * indent}{key}"
            yield from lines(value, indent + 1)
        else:
            yield f"{'  ' * indent}{key!s:<{width}}  {as_text(value)}"


def run(_=None) -> int:
    machine = {"system": platform.platform(), "python": sys.executable, "GPUs": gpus()}
    for section, content in {"machine": machine, **backends()}.items():
        print("\n".join(lines({section: content})))
    return 0
