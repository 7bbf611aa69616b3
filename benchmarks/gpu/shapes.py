"""The suite's side of a worker: what it says is kept as it comes, and it is started again without what ended it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import ClassVar

from benchmarks.gpu.processes import LOST, TIMED_OUT, Ended
from benchmarks.gpu.results import Results

START = 60.0  # seconds that a worker may take to import and to make its inputs, beside a contender's limit
GROUPS = ("errors", "step", "forward", "backward", "frozen step", "loss", "logits")
GRID = [  # (N, V, H), dtype, groups, seconds to time them in; the first one is the target
    ((8192, 128256, 4096), "bfloat16", (*GROUPS, "kernels"), 60),
    ((8192, 151936, 896), "bfloat16", (*GROUPS[:5], "kernels"), 30),
    ((2048, 32000, 4096), "bfloat16", GROUPS, 15),
    ((8192, 151936, 2048), "bfloat16", GROUPS[:5], 40),
    ((16384, 256000, 2304), "bfloat16", (*GROUPS[1:5], "logits"), 60),
    ((8192, 128256, 4096), "float16", ("errors", "forward", "backward"), 15),
    ((2048, 32000, 4096), "float32", ("errors", "forward", "backward", "logits"), 15),
]
FIRST = ((2048, 32000, 1024), "bfloat16", ("errors", "step", "forward"), 10)
DRY_GRID = [
    ((64, 384, 32), "float32", GRID[0][2], 1),
    ((32, 300, 16), "bfloat16", ("forward", "backward"), 1),
]
DRY_FIRST = ((32, 300, 32), "float32", ("errors", "forward"), 1)


class ShapeRun:
    """One shape, over as many workers as it takes."""

    def __init__(
        self, results: Results, case: tuple, contender_limit: float, left: Callable[[], float], options: list[str]
    ):
        self.results, self.contender_limit, self.left, self.options = results, contender_limit, left, options
        self.shape, self.dtype, self.groups, self.seconds = case
        self.record = results.shape(self.shape, self.dtype)
        self.without: list[str] = []
        self.now: dict | None = None  # the contender that runs
        self.since = 0.0

    def measure(self, start: Callable[..., Ended]) -> list[str]:
        """The groups that there was no time for."""
        while self._missing():
            if self.left() < 5:
                break
            self.now, self.since = None, time.monotonic()
            before = len(self._missing()), len(self.without)
            ended = start(self._command(), take=self._take, is_over=self._hangs)
            if ended.status == TIMED_OUT and not self._hangs():
                break  # the budget's end
            self._blame(ended)
            if ended.status == 0 or before == (len(self._missing()), len(self.without)):
                break
            if self._missing():
                self.results.say(f"  another process for {', '.join(self._missing())}")
        return self._missing()

    def _missing(self) -> list[str]:
        return [group for group in self.groups if group not in self.record.setdefault("ended", [])]

    def _command(self) -> list[str]:
        missing = self._missing()
        seconds = self.seconds * len(missing) / len(self.groups)
        command = ["-m", "benchmarks.gpu.worker", *self.shape, "--dtype", self.dtype, "--groups", *missing]
        return [*command, "--seconds", seconds, *(["--without", *self.without] if self.without else []), *self.options]

    def _hangs(self) -> bool:
        more = START if self.now is None else self.seconds if self.now["name"] == "rounds" else 0.0
        return time.monotonic() - self.since > self.contender_limit + more

    def _blame(self, ended: Ended) -> None:
        """What ended a worker is left out of the next one."""
        if ended.status == 0:
            return
        if self.now is None:
            self._failed("worker", ended.cause, ended.output, ours=True)
            return
        group, name, ours = (self.now[key] for key in ("group", "name", "ours"))
        if name in ("", "rounds"):
            self.record["ended"].append(group)
        else:
            self.without.append(f"{group}/{name}")
        if ended.status != LOST:
            self._failed(f"{group}/{name}", ended.cause, ended.output[-3000:], ours or name in ("", "rounds"))

    def _failed(self, what: str, why: str, trace: str, ours: bool) -> None:
        self.results.say(f"  {'FAILED' if ours else 'left out'} {what}: {why}")
        if ours:
            self.record["failed"][what] = {"why": why, "trace": trace}
            self.results.say(trace)
        else:
            self.record["left out"][what] = why
        self.results.save()

    def _take(self, line: str) -> bool:
        if not line.startswith('{"event": '):
            return False
        try:
            event = json.loads(line)
        except ValueError:
            return False
        self.since = time.monotonic()
        self._EVENTS[event.pop("event")](self, **event)
        return True

    # Events

    def _about(self, head: str) -> None:
        self.record["head"] = head

    def _live(self, blocks: list[float]) -> None:
        self.record["live blocks per token"] = blocks

    def _begins(self, **contender) -> None:
        self.now = contender

    def _ran(self, group: str, name: str, ms: float) -> None:
        self.record["first figures"].setdefault(group, {})[name] = ms
        self.results.say(f"  {group}, {name}: {ms:.3f} ms at first")
        self.results.save()

    def _contender_failed(self, group: str, name: str, why: str, trace: str, ours: bool) -> None:
        self._failed(f"{group}/{name}", why, trace, ours)

    def _errors(self, found: dict) -> None:
        self.record.setdefault("errors", {}).update(found)
        for what, (error, limit) in found.items():
            self.results.say(f"  {'ok  ' if error <= limit else 'WRONG'} {what}: {error:.3g} (at most {limit:g})")
        self.results.save()

    def _group(self, group: str, unit: str, rows: list[dict]) -> None:
        if group not in self.record["groups"]:
            self.results.say(f"  {group}:")
            for row in rows:
                floor = "" if row["floor ms"] is None else f", floor {row['floor ms']:.3f}"
                self.results.say(f"    {row['name']:32} {row['median']:9.3f} ms {row['over unit']:8.3f}{floor}")
        self.record["groups"][group] = {"unit": unit, "rows": rows}
        self.record["first figures"].pop(group, None)
        self.results.save()

    def _loss_kernels(self, found: dict) -> None:
        self.record["loss kernels"] = found or {}
        if not found:
            self.results.say("  the profiler's trace is empty: no times of single kernels")
        self.results.save()

    def _kernels(self, backward: str, rows: list[dict]) -> None:
        self.record.setdefault("kernels", {})[backward] = rows
        self.results.save()

    def _ended(self, group: str) -> None:
        self.record["ended"].append(group)
        self.now = None
        self.results.save()

    _EVENTS: ClassVar = {
        "about": _about, "live": _live, "begins": _begins, "ran": _ran, "failed": _contender_failed, "errors": _errors,
        "group": _group, "loss kernels": _loss_kernels, "kernels": _kernels, "ended": _ended,
    }  # fmt: skip


def failures(record: dict) -> list[str]:
    """What of ours failed or is wrong, over all shapes."""
    found = []
    for shape in record["shapes"]:
        name = f"({shape['N']}, {shape['V']}, {shape['H']}) {shape['dtype']}"
        found += [f"{name}: {what}: {failure['why']}" for what, failure in shape["failed"].items()]
        for what, (error, limit) in shape.get("errors", {}).items():
            if not error <= limit:
                found.append(f"{name}: {what} is off by {error:.3g}, at most {limit:g}")
    return found
