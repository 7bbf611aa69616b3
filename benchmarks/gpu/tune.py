"""Times tiles: every candidate of a kernel in a step that launches it, by the kernel's own time on the GPU.

python -m benchmarks.gpu.tune [KERNEL ...] [--write] [--shape 8192 128256 4096] [--dtype bfloat16] [--seconds 400]

Prints every candidate as it was timed; `--write` puts each kernel's fastest one into fastdpo/ops/triton/tuned.json,
which the library reads before its own table: commit what was measured. A candidate whose results are not the present
tile's cannot win. One that spills or does not fit is reported by `make kernels`; here it is only slow, or fails.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import triton

from benchmarks.gpu.cases import ShapeCases
from benchmarks.gpu.timing import elapsed, gpu_is_lost, kernel_times
from fastdpo.costs.steps import Shape
from fastdpo.ops.triton import launch as triton_launch
from fastdpo.ops.triton import special
from fastdpo.ops.triton.launch import Target, Tile, target_of

# Largest share of a step first.
SPACE = {
    "fold": [Tile(m, n, k, w, s) for (m, n), k, w, s in itertools.product(
        [(128, 256), (128, 128), (256, 128)], [64], [8], [3, 4])] + [
        Tile(128, 128, k, 4, s, per_sm=2) for k, s in [(64, 3), (32, 4), (32, 6)]],
    "routed_dz": [Tile(m, 128, k, w, s, per_sm=p) for m, k, (w, p), s in itertools.product(
        [64, 128], [64, 128], [(4, 2), (8, 1), (4, 3)], [3, 4])],
    "routed_dhidden": [Tile(64, n, k, w, s, per_sm=p) for n, k, w, (s, p) in itertools.product(
        [128, 256], [64, 128], [4, 8], [(1, 3), (1, 2), (2, 2)])],
    "routed_dweight": [Tile(128, n, k, w, s) for n, k, w, s in itertools.product(
        [128, 256], [32, 64], [4, 8], [3, 4])],
    "dz": [Tile(m, n, 64, 8, s) for (m, n), s in itertools.product([(128, 256), (128, 128)], [3, 4])],
    "dhidden": [Tile(m, n, 64, 8, s) for (m, n), s in itertools.product([(128, 256), (128, 128), (256, 128)], [3, 4])],
    "dweight": [Tile(m, n, 64, 8, s) for (m, n), s in itertools.product([(128, 256), (128, 128), (256, 128)], [3, 4])],
}  # fmt: skip
GROUPS = [4, 8, 16]  # of token tiles: tried with the fastest tile of the dense kernels
STEP_OF = {"fold": "forward", "dz": "exact", "dhidden": "exact", "dweight": "exact"}
KERNEL_OF = {"dz": "exact", "dhidden": "exact", "dweight": "exact"}  # tiles of one launch, whose programs they share


def runs_of(cases: ShapeCases) -> dict:
    forward, backward = cases.case("forward").contenders, cases.case("backward").contenders
    return {"forward": forward["fastdpo"], "exact": backward["exact"], "routed": backward["routed"]}


TOLERANCE = 0.02  # of a row's length: sums in another order, rounded to bf16


class Lost(Exception):
    """The GPU serves this process no more."""


def clock_of(kernel: str, run: Callable, device: str) -> tuple[str, Callable[[], float]]:
    """(what is timed, milliseconds of it): the kernel alone, or the whole run where nothing can be traced."""
    name = f"{KERNEL_OF.get(kernel, kernel)}_kernel"
    if device == "cuda" and name in kernel_times(run, runs=1):
        return name, lambda: kernel_times(run, runs=2)[name][0]
    return "the whole run", lambda: elapsed(run, device)


def difference(found: tuple, expected: tuple) -> float:
    """The largest one of any row, over the row's length or a thousandth of the usual one; NaN where one is."""
    worst = torch.zeros((), dtype=torch.float64)
    for x, e in zip(found, expected):
        x, e = (y.double().view(y.shape[0], -1) for y in (x, e))
        length = e.norm(dim=1)
        off = (x - e).norm(dim=1) / torch.maximum(length, 1e-3 * length.mean()).clamp(min=1e-300)
        worst = torch.maximum(worst, torch.where(off.isnan().any(), torch.nan, off.amax()).cpu())
    return worst.item()


def results_of(run: Callable) -> tuple:
    found = run()
    return tuple(x.clone() for x in (found if isinstance(found, tuple) else (found,)))


def tune(kernel: str, candidates: list[Tile], run, target: Target, kind: str, device: str, deadline: float):
    """[(milliseconds or why not, tile)], fastest first; the present tile, which is among them; and what was timed."""
    key, table = (kernel, kind, target.capability), triton_launch.tuned()
    before, present = table.get(key), triton_launch.tile(kernel, target, kind)
    results = []
    try:
        with special.forced(None):
            table[key] = present
            expected, (timed, clock) = results_of(run), clock_of(kernel, run, device)
            print(f"{kernel}, {kind}, {timed}", flush=True)
            for tile in [present, *(one for one in candidates if one != present)]:
                if results and time.monotonic() > deadline:
                    break
                table[key] = tile
                try:
                    off = difference(results_of(run), expected)
                    results.append((clock() if off <= TOLERANCE else f"differs by {off:.3g}", tile))
                except Exception as error:  # too much shared memory, or a shape that the compiler refuses
                    results.append((f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}", tile))
                    if gpu_is_lost(device):
                        raise Lost(f"{tile}: {results[-1][0]}") from error
                took = results[-1][0]
                shown = f"{took:9.3f} ms" if isinstance(took, float) else took
                print(f"  {shown}  {tile}{'  (present)' if tile == present else ''}", flush=True)
    finally:
        if before is None:
            table.pop(key, None)
        else:
            table[key] = before
    return sorted(results, key=lambda r: (isinstance(r[0], str), r[0])), present, timed


def write(entry: dict) -> None:
    """Into the table, in place of what was measured before for the same."""

    def key(one: dict) -> tuple:
        return one["kernel"], one["kind"], one["capability"], one["triton"].split(".")[:2]

    others = [one for one in json.loads(triton_launch.TUNED.read_text()) if key(one) != key(entry)]
    lines = ",\n ".join(json.dumps(one) for one in sorted([*others, entry], key=key))
    whole = triton_launch.TUNED.with_suffix(".new")
    whole.write_text(f"[{lines}]\n")
    os.replace(whole, triton_launch.TUNED)
    triton_launch.tuned.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(SPACE)}; default all")
    parser.add_argument("--shape", type=int, nargs=3, default=(8192, 128256, 4096))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--write", action="store_true", help="the fastest ones into the table; not without a GPU")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    unknown = set(args.kernels) - set(SPACE)
    if unknown:
        parser.error(f"no kernel {sorted(unknown)}; there are {list(SPACE)}")
    on_gpu = args.device == "cuda"
    shape = Shape(*(args.shape if on_gpu else (64, 384, 32)), getattr(torch, args.dtype if on_gpu else "float32"))
    target = target_of(torch.device("cuda")) if on_gpu else Target(90, 132)
    half = "fp32" if shape.dtype == torch.float32 else "half"
    torch.manual_seed(0)
    runs = runs_of(ShapeCases(shape, args.device, target))
    names = args.kernels or list(SPACE)
    end = time.monotonic() + args.seconds
    for index, kernel in enumerate(names):
        candidates = SPACE[kernel] if on_gpu else SPACE[kernel][:1]
        run = runs[STEP_OF.get(kernel, "routed")]
        recomputes = kernel in ("fold", "dz", "routed_dz")
        is_short = recomputes and half == "half" and shape.hidden_size <= triton_launch.SHORT
        kind = "short" if is_short else half
        deadline = time.monotonic() + (end - time.monotonic()) / (len(names) - index)
        results, present, timed = tune(kernel, candidates, run, target, kind, args.device, deadline)
        best = results[0][1]
        if on_gpu and kernel in STEP_OF and not isinstance(results[0][0], str):
            grouped = [replace(best, group=group) for group in GROUPS if group != best.group]
            more, *_ = tune(kernel, [best, *grouped], run, target, kind, args.device, deadline)
            results = sorted([*results, *more], key=lambda r: (isinstance(r[0], str), r[0]))
            best = results[0][1]
        print(f"  fastest: {best}", flush=True)
        if args.write and on_gpu and best != present and not isinstance(results[0][0], str):
            before = next(took for took, tile in results if tile == present)
            write({
                "kernel": kernel, "kind": kind, "capability": target.capability, "triton": triton.__version__,
                "tile": asdict(best), "ms": round(results[0][0], 4), "present_ms": before, "timed": timed,
                "shape": [shape.num_tokens, shape.vocab_size, shape.hidden_size],
                "device": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
            })  # fmt: skip
            print(f"  written: {triton_launch.TUNED}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
