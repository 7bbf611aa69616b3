"""python -m tests.soak --steps 10000: what a process holds after so many random steps, beside what it held before.

Resident memory (freed memory is handed back first), tensors and objects that Python knows, file descriptors, threads,
and the length of everything at module level in fastdpo that could grow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from random_steps import Steps

MIB = 2**20


def caches() -> dict[str, int]:
    """The length of every container and cache that a module of fastdpo, or a class in it, holds."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "fastdpo" or module is None:
            continue
        for owner, values in [(name, vars(module))] + [
            (f"{name}.{kind.__name__}", vars(kind))
            for kind in vars(module).values()
            if isinstance(kind, type) and kind.__module__ == name
        ]:
            for key, value in list(values.items()):
                if key.startswith("__") or getattr(value, "__module__", name) not in (name, None, "weakref"):
                    continue
                value = getattr(value, "__func__", value)
                if hasattr(value, "cache_info"):
                    found[f"{owner}.{key}"] = value.cache_info().currsize
                elif hasattr(value, "__len__") and not isinstance(value, (str, bytes, tuple, type)):
                    found[f"{owner}.{key}"] = len(value)
    return found


def held() -> dict[str, int]:
    """What this process holds now; not what only a collection of cycles would free."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    objects = gc.get_objects()
    tensors = [x for x in objects if issubclass(type(x), torch.Tensor)]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "tensors": len(tensors),
        "tensor bytes": sum(x.untyped_storage().nbytes() for x in tensors),
        "objects": len(objects),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def grown(before: dict[str, int], after: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """What is more than it was, by more than is allowed."""
    return [
        f"{name}: {before.get(name, 0)} before, {value} after"
        for name, value in after.items()
        if value - before.get(name, 0) > allowed.get(name, 0)
    ]


# Of a process that is warm. glibc keeps an arena per thread and freed pieces in it; objects are torch's own registries
# of what it has seen; neither may go on growing, and main looks at both halves of a run.
ALLOWED = {"resident": 24 * MIB, "objects": 400}


def run(steps: Steps, count: int) -> Counter:
    kinds = Counter()
    for index in range(count):
        try:
            kinds[steps.step()] += 1
        except Exception as error:
            raise AssertionError(f"step {index} of {count}, after {dict(kinds)}") from error
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="*", default=["", "reference"], help="in turn; '' is the machine's own")
    parser.add_argument("--warm", type=float, default=0.2, help="share of the steps before the first look")
    parser.add_argument("--looks", type=int, default=8)
    args = parser.parse_args()
    steps = Steps(args.seed, tuple(name or None for name in args.engines))
    try:
        from causal_models import build
    except ImportError as error:
        print(f"without models: {error}")
    else:
        steps.with_models(build)
    started, kinds = time.perf_counter(), run(steps, int(args.steps * args.warm))
    first, first_caches = held(), caches()
    table = [(sum(kinds.values()), first)]
    for _ in range(args.looks):
        kinds += run(steps, (args.steps - int(args.steps * args.warm)) // args.looks)
        table.append((sum(kinds.values()), held()))
    print(f"{sum(kinds.values())} steps of seed {args.seed} in {time.perf_counter() - started:.0f} s: {dict(kinds)}")
    print("  ".join(f"{name:>12}" for name in ("steps", *first)))
    for count, values in table:
        shown = [f"{x / MIB:.1f} MiB" if name == "resident" else x for name, x in values.items()]
        print("  ".join(f"{x:>12}" for x in (count, *shown)))
    found = grown(first, table[-1][1], ALLOWED) + grown(first_caches, caches(), {})
    middle = table[len(table) // 2][1]
    found += [
        f"since the middle, {what}" for what in grown(middle, table[-1][1], {"resident": 12 * MIB, "objects": 200})
    ]
    print("\n".join(found) or "nothing grew")
    return len(found) > 0


if __name__ == "__main__":
    sys.exit(main())
