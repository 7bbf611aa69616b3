"""Medians of interleaved runs on the GPU's clock (in a dry run, the host's), and the memory of one run."""

from __future__ import annotations

import re
import statistics
import time
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


def interleaved(
    contenders: dict[str, Callable[[], object]], device: str, *, rounds: int = 15, seconds: float = 20.0
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings, why the others were left out). Each round runs every contender once, in turn."""
    extra, left_out = {}, {}
    for name, run in contenders.items():
        try:
            run()  # compiles
            extra[name] = _extra_memory(run, device)
        except Unavailable as reason:
            left_out[name] = str(reason)
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
            torch.cuda.empty_cache()
        except Exception as error:  # a peer's own failure is a result, not the end of the suite
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    samples: dict[str, list[float]] = {name: [] for name in extra}
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
        run()
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
    """Per GPU kernel (milliseconds, launches) of one run, by the profiler's trace. csrc's by their bare names."""
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
    """GPU kernels, copies and fills of one run."""
    return sum(count for _, count in kernel_times(run, runs=1).values()) if device == "cuda" else None
