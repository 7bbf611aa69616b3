"""Times the special forward kernel of this GPU, in all its forms, beside the plain one; writes which of them serves.

python -m benchmarks.gpu.forwards [--write] [--sizes H ...] [--dtypes ...] [--seconds 60]

A kernel that differs from the plain one, on a small problem or on the timed one, is not written: exit status 1.
The table is fastdpo/ops/triton/special.json: commit what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import triton

from benchmarks.gpu.timing import interleaved
from fastdpo.ops.problem import Head, Rows
from fastdpo.ops.triton import special
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.common import LowRank, TokenRange
from fastdpo.ops.triton.fold import plain_fold
from fastdpo.ops.triton.launch import target_of
from fastdpo.ops.triton.special import Measured
from fastdpo.ops.triton.stats import BlockSums
from fastdpo.ops.triton.tokens import compact

TOKENS, COLUMNS = 8192, 128256
SIZES = (4096, 2048, 896, 8192, 3072, 1536, 5120, 512)  # most important first


class Differs(Exception):
    """The special kernel is wrong."""


def measure(
    kernel: str,
    folds: dict[str, Callable],
    size: int,
    dtype: torch.dtype,
    device: str,
    *,
    tokens=TOKENS,
    columns=COLUMNS,
    seconds=10.0,
) -> Measured:
    """Measured of one H and type."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, device=device).to(dtype)
    weight = torch.empty(columns, size, device=device, dtype=dtype).normal_(std=2 * size**-0.5)
    labels = torch.randint(columns, (tokens,), device=device)
    call = Call(Head(hidden, weight, compute_dtype=dtype), Rows(labels, -100, 0, columns))
    gathered = torch.empty(tokens, call.pitch, dtype=dtype, device=device)
    part = TokenRange(compact(call, first=gathered), 0, tokens)
    outputs, runs = {}, {}
    for name, fold in {"plain": plain_fold, **folds}.items():
        sums = BlockSums.empty((), tokens, call.num_blocks, call.device)
        label_logit = torch.full((tokens,), torch.nan, device=device)
        outputs[name] = sums.lse, label_logit
        runs[name] = partial(fold, call, part, gathered, LowRank(), label_logit, sums)
    times, left_out = interleaved(runs, device, seconds=seconds)
    if left_out:
        raise Differs(f"H {size}, {dtype}: {left_out}")
    for name, fold in folds.items():
        small = special.difference(call, fold, plain_fold)
        large = max((a - b).abs().amax().item() for a, b in zip(outputs[name], outputs["plain"]))
        if not (small <= special.TOLERANCE and large <= special.TOLERANCE):
            raise Differs(f"{name}, H {size}, {dtype}: by {small:.3g} on the small problem, {large:.3g} on this one")
    form = min(folds, key=lambda name: times[name].median)
    return Measured(
        kernel=kernel,
        form=form,
        capability=call.target.capability,
        hidden_size=size,
        dtype=str(dtype).removeprefix("torch."),
        triton=triton.__version__,
        special_ms=round(times[form].median, 4),
        plain_ms=round(times["plain"].median, 4),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        date=datetime.date.today().isoformat(),
    )


def write(found: list[Measured]) -> None:
    """Into the table, in place of what was measured before for the same."""

    def key(x: Measured) -> tuple:
        return x.kernel, x.capability, x.dtype, x.triton, x.hidden_size

    entries = {key(x): asdict(x) for x in (*special.table(), *found)}
    lines = ",\n ".join(json.dumps(entries[name]) for name in sorted(entries))
    whole = special.TABLE.with_suffix(".new")
    whole.write_text(f"[{lines}]\n")
    os.replace(whole, special.TABLE)
    special.table.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    capability = target_of(torch.device(args.device)).capability
    kernel = special.KERNELS.get(capability)
    if kernel is None:
        print(f"no special forward kernel for {'sm_' + str(capability) if capability else 'the interpreter'}")
        return 0
    module, deadline = special.load(kernel), time.monotonic() + args.seconds
    folds = {form: partial(module.fold, form=form) for form in module.FORMS}
    found, wrong = [], []
    for dtype in args.dtypes:
        for size in args.sizes:
            if time.monotonic() > deadline:
                print(f"not reached: H {size}, {dtype}")
                continue
            try:
                one = measure(kernel, folds, size, getattr(torch, dtype), args.device)
            except Differs as error:
                wrong.append(str(error))
                continue
            found.append(one)
            print(
                f"{kernel} {one.form}, H {size}, {dtype}: {one.special_ms:.3f} ms, plain {one.plain_ms:.3f} ms",
                flush=True,
            )
    for one in wrong:
        print(f"WRONG {kernel}: {one}")
    if args.write and found and not wrong:
        write(found)
        print(f"written: {special.TABLE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
