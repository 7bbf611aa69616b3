"""Times tiles: every candidate of a kernel in a step that launches it, by the kernel's own time on the GPU.

python -m benchmarks.gpu.tune [KERNEL ...] [--shape 8192 128256 4096] [--dtype bfloat16] [--seconds 400]

Prints per kernel the candidates, fastest first, and the line to paste into fastdpo/ops/triton/launch.py. A candidate
that spills or does not fit is reported by `make kernels`; here it is only slow, or fails and is named.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import replace

import torch

from benchmarks.gpu.cases import ShapeCases
from benchmarks.gpu.timing import interleaved, kernel_times
from fastdpo.ops.triton import launch as triton_launch
from fastdpo.ops.triton import special
from fastdpo.ops.triton.launch import Target, Tile, target_of
from tools.cost_model import Shape

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


def time_of(kernel: str, run, device: str) -> float:
    """Milliseconds of the kernel in one run; of the whole run where there is no GPU to ask."""
    if device != "cuda":
        return interleaved({"run": run}, device, rounds=1)[0]["run"].median
    return kernel_times(run, runs=2)[f"{KERNEL_OF.get(kernel, kernel)}_kernel"][0]


def tune(kernel: str, candidates: list[Tile], run, target: Target, kind: str, device: str, deadline: float):
    """[(milliseconds or why not, tile)], fastest first; the present tile is among them."""
    entries = triton_launch._TILES[kernel].setdefault(kind, {})
    before = entries.get(target.tiles)
    present = triton_launch.tile(kernel, target, kind)
    results = []
    try:
        for tile in [present, *(one for one in candidates if one != present)]:
            if results and time.monotonic() > deadline:
                break
            entries[target.tiles] = tile
            try:
                with special.forced(None):
                    results.append((time_of(kernel, run, device), tile))
            except Exception as error:  # too much shared memory, or a shape that the compiler refuses
                results.append((f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}", tile))
    finally:
        if before is None:
            entries.pop(target.tiles)
        else:
            entries[target.tiles] = before
    return sorted(results, key=lambda r: (isinstance(r[0], str), r[0])), present


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(SPACE)}; default all")
    parser.add_argument("--shape", type=int, nargs=3, default=(8192, 128256, 4096))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=400)
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
        is_short = kernel == "fold" and half == "half" and shape.hidden_size <= triton_launch.SHORT
        kind = "short" if is_short else half
        deadline = time.monotonic() + (end - time.monotonic()) / (len(names) - index)
        results, present = tune(kernel, candidates, run, target, kind, args.device, deadline)
        best = results[0][1]
        if on_gpu and kernel in STEP_OF and not isinstance(results[0][0], str):
            grouped = [replace(best, group=group) for group in GROUPS if group != best.group]
            more, _ = tune(kernel, [best, *grouped], run, target, kind, args.device, deadline)
            results = sorted([*results, *more], key=lambda r: (isinstance(r[0], str), r[0]))
            best = results[0][1]
        print(f"\n{kernel}, {kind}, {shape.num_tokens} x {shape.vocab_size} x {shape.hidden_size}")
        for took, tile in results:
            shown = f"{took:9.3f} ms" if isinstance(took, float) else took
            print(f"  {shown}  {tile}{'  (present)' if tile == present else ''}")
        print(f'  "{kernel}": {{"{kind}": {{{target.tiles}: {best}}}}}', flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
