"""Medians of interleaved runs on the GPU's clock (in a dry run, the host's), and the memory of one run."""

from __future__ import annotations

import re
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.peers import Unavailable

MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Of one contender, in milliseconds."""

    median: float
    low: float  # quartiles of the runs
    high: float
    runs: int
    extra_mib: float | None  # peak memory beyond what was allocated before and what the run returned

    def row(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Failure:
    """Why a contender has no time."""

    why: str  # one line
    trace: str = ""  # of an error; empty where it cannot run here by its own word
    is_sticky: bool = False  # the GPU serves this process no more


class Watch:
    """Is told what happens to each contender, as it happens."""

    def begins(self, name: str) -> None: ...

    def ran(self, name: str, milliseconds: float) -> None: ...

    def failed(self, name: str, failure: Failure) -> None: ...


def interleaved(
    contenders: dict[str, Callable[[], object]],
    device: str,
    *,
    rounds: int = 15,
    seconds: float = 20.0,
    watch: Watch | None = None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings, why the others were left out). Each round runs every contender once, in turn."""
    watch, extra, left_out = watch or Watch(), {}, {}
    for name, run in contenders.items():
        watch.begins(name)
        try:
            run()  # compiles
            extra[name] = _extra_memory(run, device)
            watch.ran(name, _one_round({name: run}, device)[name])
        except Exception as error:
            extra.pop(name, None)
            failure = failure_of(error, device)
            left_out[name] = failure.why
            watch.failed(name, failure)
    samples: dict[str, list[float]] = {name: [] for name in extra}
    watch.begins("rounds")
    deadline = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 3 and time.monotonic() > deadline:
            break
        for name, sample in _one_round({name: contenders[name] for name in extra}, device).items():
            samples[name].append(sample)
    timings = {}
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        timings[name] = Timing(statistics.median(values), low, high, len(values), extra[name])
    return timings, left_out


def failure_of(error: Exception, device: str) -> Failure:
    """Of an error that has just been caught."""
    if isinstance(error, Unavailable):
        return Failure(str(error))
    trace = traceback.format_exc()
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return Failure("out of memory", trace)
    last = (str(error).strip().splitlines() or [""])[-1][:200]
    return Failure(f"{type(error).__name__}: {last}", trace, gpu_is_lost(device))


def gpu_is_lost(device: str) -> bool:
    """After an illegal access, say, every later call of the process fails."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        return True
    return False


def _one_round(contenders: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    if device != "cuda":
        taken = {}
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            taken[name] = (time.perf_counter() - begin) * 1e3
        return taken
    marks = {}
    for name, run in contenders.items():
        torch.cuda.synchronize()  # the next one's launches are timed with it, as its user sees them
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        marks[name] = begin, end
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) for name, (begin, end) in marks.items()}


def _extra_memory(run: Callable[[], object], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    returned = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
    return (torch.cuda.max_memory_allocated() - before - returned) / MIB


def kernel_times(run: Callable[[], object], runs: int = 3) -> dict[str, tuple[float, float]]:
    """Per GPU kernel (milliseconds, launches) of one run, by the profiler's trace. csrc's by their bare names.

    Empty where the machine lets nobody trace (CUPTI refused): the caller says so, and asks `elapsed`.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    return {
        _bare(event.key): (event.self_device_time_total / 1e3 / runs, event.count / runs)
        for event in trace.key_averages()
        if event.self_device_time_total > 0
    }


def _bare(name: str) -> str:
    """list_fill_kernel of fastdpo::(anonymous namespace)::list_fill_kernel(fastdpo::PairListArgs)"""
    found = re.search(r"fastdpo::.*?(\w+_kernel)\b", name)
    return found[1] if found else name


def launches_of(run: Callable[[], object], device: str) -> float | None:
    """GPU kernels, copies and fills of one run; None where nothing can count them."""
    found = kernel_times(run, runs=1) if device == "cuda" else {}
    return sum(count for _, count in found.values()) if found else None


def elapsed(run: Callable[[], object], device: str, runs: int = 5) -> float:
    """Median milliseconds of a whole run, on the GPU's clock."""
    return statistics.median(_one_round({"run": run}, device)["run"] for _ in range(runs))
