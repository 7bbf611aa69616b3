"""Measures one shape in a process of its own: a line of JSON on stdout for everything that is known, once it is.

python -m benchmarks.gpu.worker N V H [--dtype bfloat16] [--groups errors forward step ...] [--without GROUP/NAME ...]

`begins` comes before a contender's first run, so that whoever reads knows what a hang or a crash is due to. A process
that the GPU serves no more, after an illegal access say, ends with exit status 3.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable

import torch

from benchmarks.gpu.cases import GROUPS, Case, ShapeCases
from benchmarks.gpu.processes import LOST
from benchmarks.gpu.timing import Failure, Watch, failure_of, interleaved, kernel_times, launches_of
from fastdpo.costs.gpus import Gpu
from fastdpo.costs.steps import Shape

COUNTED = ("step", "frozen step", "loss")  # groups of which every contender's launches are counted


def say(event: str, **more) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


class Lost(Exception):
    """The GPU serves this process no more."""


class Reporter(Watch):
    def __init__(self, group: str, is_ours):
        self.group, self.is_ours = group, is_ours

    def begins(self, name: str) -> None:
        say("begins", group=self.group, name=name, ours=self.is_ours(name))

    def ran(self, name: str, milliseconds: float) -> None:
        say("ran", group=self.group, name=name, ms=milliseconds)

    def failed(self, name: str, failure: Failure) -> None:
        ours = bool(failure.trace) and self.is_ours(name)
        say("failed", group=self.group, name=name, why=failure.why, trace=failure.trace, ours=ours)
        if failure.is_sticky:
            raise Lost(f"{self.group}, {name}: {failure.why}")


def both_ways(group: str, device: str, without: set[str], found: Callable[[str], dict]) -> None:
    """What is `found` of the exact backward and of the routed one, which are ours."""
    watch = Reporter(group, lambda name: True)
    for backward in ("exact", "routed"):
        if f"{group}/{backward}" in without:
            continue
        watch.begins(backward)
        try:
            say(group, **found(backward))
        except Exception as error:
            watch.failed(backward, failure_of(error, device))


def row_of(case: Case, name: str, timing, unit: float, shape: Shape, gpu: Gpu | None) -> dict:
    cost = case.floors[name]() if gpu is not None and name in case.floors else None
    return {
        "name": name, **timing.row(), "over unit": timing.median / unit,
        "floor ms": cost and cost.floor(gpu) * 1e3, "launches counted": cost and cost.total().launches,
        "passes": cost and cost.total().flops / shape.one_pass, "launches": None,
    }  # fmt: skip


def group(cases: ShapeCases, name: str, gpu: Gpu | None, args) -> None:
    """One group's contenders, timed in turn."""
    say("begins", group=name, name="", ours=True)
    case = cases.case(name)
    wanted = {
        key: run for key, run in case.contenders.items()
        if f"{name}/{key}" not in args.without and (not args.ours or key == case.unit or case.is_ours(key))
    }  # fmt: skip
    watch = Reporter(name, lambda key: case.is_ours(key) or key == case.unit)
    timings, _ = interleaved(
        wanted, args.device, rounds=args.rounds, seconds=args.seconds / len(args.groups), watch=watch
    )
    unit, rows = timings[case.unit].median if case.unit in timings else float("nan"), []
    for key, timing in timings.items():
        try:
            rows.append(row_of(case, key, timing, unit, cases.shape, gpu))
        except Exception as error:  # the floor counts what the routing keeps, which is a run of ours
            rows.append(row_of(Case(case.unit, {}), key, timing, unit, cases.shape, None))
            watch.failed(f"{key}, floor", failure_of(error, args.device))
    say("group", group=name, unit=case.unit, rows=rows)
    if name in COUNTED and args.device == "cuda":
        for row in rows:
            row["launches"] = launches_of(case.contenders[row["name"]], args.device)
        say("group", group=name, unit=case.unit, rows=rows)
    if name == "loss" and args.device == "cuda" and "fastdpo, from tokens" in timings:
        found = kernel_times(case.contenders["fastdpo, from tokens"])
        say("loss kernels", found={key: took for key, took in found.items() if "preference" in key})


def measure(args) -> None:
    from fastdpo.ops.triton.launch import Target, target_of

    target = target_of(torch.device("cuda")) if args.device == "cuda" else Target(90, 132)
    gpu = Gpu(*args.rates) if args.rates else None
    torch.manual_seed(0)
    shape = Shape(*args.shape, getattr(torch, args.dtype))
    cases = ShapeCases(shape, args.device, target, args.head)
    say("about", head=cases.inputs_name)
    for name in args.groups:
        try:
            if name == "errors":
                both_ways(name, args.device, args.without, lambda way: {"found": cases.errors(way)})
            elif name == "kernels":
                live = [round(x.sum().item() / shape.num_tokens, 2) for x in cases.live]
                say("live", blocks=live)
                both_ways(name, args.device, args.without,
                          lambda way: {"backward": way, "rows": cases.kernels(way, gpu)})  # fmt: skip
            else:
                group(cases, name, gpu, args)
        except Lost:
            raise
        except Exception as error:
            Reporter(name, lambda key: True).failed("", failure_of(error, args.device))
        if args.device == "cuda":
            torch.cuda.empty_cache()
        say("ended", group=name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=int, nargs=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", nargs="+", default=("errors", *GROUPS))
    parser.add_argument("--without", nargs="*", default=(), help="GROUP/NAME of contenders that are not run")
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rates", type=float, nargs=2, help="operations and bytes per second: floors are made of them")
    parser.add_argument("--head")
    args = parser.parse_args(argv)
    args.without = set(args.without)
    try:
        measure(args)
    except Lost as why:
        print(f"the GPU serves this process no more: {why}", file=sys.stderr, flush=True)
        return LOST
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
