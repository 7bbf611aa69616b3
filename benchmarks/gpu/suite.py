"""The GPU suite: is it right, how fast is it beside its floor and every peer, do the tests pass, which tiles are best.

python -m benchmarks.gpu.suite [--install] [--wheels DIR] [--output DIR] [--budget 540] [--stages NAME ...]
                               [--head FILE] [--commit NAME] [--dry-run]

Most important first; each stage in processes of its own. Whatever is known is in DIR/result.json at once, so that a
kill at any second loses only what ran; a second call with the same folder goes on where the first one stopped. What
the budget (seconds) leaves no time for is named. Exit status 1: something of ours failed; 2: no GPU. `--dry-run` walks
every stage without one, at toy shapes in Triton's interpreter, and measures nothing that means anything.

`python -m benchmarks.gpu.measured --keep DIR` makes the folder the committed result and tables.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import machine, shapes
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.measured import digests
from benchmarks.gpu.processes import Ended, Stopped, run, stop_on_signals
from benchmarks.gpu.results import OtherState, Results

TABLES = [ROOT / "fastdpo" / "ops" / "triton" / name for name in ("special.json", "tuned.json")]
# Files, so that nothing is collected that is not for a GPU
TESTS = ["tests/ops", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py"))]
TESTS = [name for name in TESTS if name not in ("tests/test_build.py", "tests/test_house.py")]
ONE_TEST = re.compile(r"^(?:tests/.+?|\[gw\d+\].*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b *(tests/.*)?")


class Suite:
    def __init__(self, args: argparse.Namespace, results: Results):
        self.args, self.results, self.record = args, results, results.record
        self.deadline = time.monotonic() + args.budget
        self.device = "cpu" if args.dry_run else "cuda"
        for table in () if args.dry_run else TABLES:
            results.restore(table)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def child(
        self, command: Sequence, limit: float, *, interpret: bool = True, under: Sequence[str] = (), more=None, **hooks
    ) -> Ended:
        """`interpret`: in a dry run. `more`: environment variables."""
        environment = machine.environment(self.args.dry_run and interpret) | (more or {})
        return run(
            [*under, sys.executable, *map(str, command)], limit=max(1.0, min(limit, self.left())),
            environment=environment, folder=ROOT, show=self.results.say, **hooks,
        )  # fmt: skip

    # Stages: None, or why one failed. What they find is in the record before they return.

    def wheels(self) -> str | None:
        """The peers, from a folder; one that does not install leaves the others."""
        found = sorted(str(file) for file in self.args.wheels.glob("*.whl"))
        beside = self.args.wheels.resolve() / "installed"  # the machine's own packages stay as they are
        install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", beside]
        if found and self.child([*install, *found], 120, interpret=False).status != 0:
            for wheel in found:
                self.child([*install, wheel], 60, interpret=False)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(beside)]))
        sys.path.append(str(beside))
        self.record["peers"] = machine.peers()
        self.results.say(f"  {self.record['peers']}")
        return None if found else f"no wheels in {self.args.wheels}"

    def first(self) -> str | None:
        return self.shape(shapes.DRY_FIRST if self.args.dry_run else shapes.FIRST, ["--ours"])

    def install(self) -> str | None:
        """Of this checkout, for this GPU alone. Without it Triton's kernels serve, from the source tree."""
        command = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        archs = {"FASTDPO_CUDA_ARCHS": str(self.record["device"].get("capability", 90))}
        ended = self.child(command, 240, interpret=False, more=archs)
        built = ROOT / "fastdpo" / "_build.json"
        self.record["build"] = json.loads(built.read_text()) if built.exists() else "none: Triton's kernels only"
        self.results.say(f"  {self.record['build']}")
        return None if ended.status == 0 else ended.cause

    def ceilings(self) -> str | None:
        found = []
        ended = self.child(["-m", "benchmarks.gpu.ceilings", self.device], 60, take=_json_into(found))
        if not found:
            return ended.cause
        self.record["ceilings"] = found[-1]
        return None

    def target(self) -> str | None:
        return self.shape((shapes.DRY_GRID if self.args.dry_run else shapes.GRID)[0])

    def compile(self) -> str | None:
        """Every form of every kernel, in parallel, so that the tests find them in Triton's cache."""
        narrow = ["--kernel", "compact", "--dtype", "bf16"] if self.args.dry_run else []
        command = ["-m", "tools.kernels", "--arch", self.record["device"].get("capability", 90), *narrow]
        ended = self.child(command, 90, interpret=False)
        faults = [found for found in ended.output.splitlines() if found.startswith("FAULT")]
        self.record["compile"] = {"status": ended.status, "seconds": round(ended.seconds, 1), "faults": faults}
        return None if ended.status in (0, 1) else ended.cause  # 1: with faults, which are in the record

    def tests(self) -> str | None:
        """Counted as they end, a failure named at once."""
        record = self.record["tests"] = {"counts": {}, "failures": []}

        def take(line: str) -> bool:
            found = ONE_TEST.match(line)
            if found is None:
                return False
            outcome = found[1].lower()
            record["counts"][outcome] = record["counts"].get(outcome, 0) + 1
            if outcome in ("failed", "error"):
                record["failures"].append(line)
                self.results.say(line)
            if outcome != "passed" or record["counts"]["passed"] % 50 == 0:
                self.results.save()
            return True

        parallel = ["-n", "8"] if importlib.util.find_spec("xdist") and not self.args.dry_run else []
        how = ["--collect-only", "-q"] if self.args.dry_run else ["-v", *parallel]
        command = ["-m", "pytest", *TESTS, "-k", "triton or cuda or gpu", "--tb=short", *how]
        ended = self.child(command, 300, interpret=False, take=take)
        collected = re.search(r"(\d+)(?:/\d+)? tests collected", ended.output)
        record |= {"collected": int(collected[1])} if collected else {}
        record |= {"status": ended.status, "seconds": round(ended.seconds, 1)}
        self.results.say(f"  {record['counts']}")
        return None if ended.status == 0 else ended.cause

    def forwards(self) -> str | None:
        """Which forward kernel is the faster one: the table that the library reads is written."""
        ended = self.child(["-m", "benchmarks.gpu.forwards", "--write", "--device", self.device], 90)
        self.record["forwards"] = ended.output[-2000:].splitlines()
        return None if ended.status == 0 else ended.cause

    def tune(self) -> str | None:
        """Which tiles are the fastest: as above. Small hidden sizes have some of their own."""
        asked = [([], shapes.GRID[0][0], 160), (["fold", "routed_dz"], shapes.GRID[1][0], 80)]
        if self.args.dry_run:
            asked = [(["fold"], shapes.GRID[0][0], 10)]
        self.record["tune"], causes = [], []
        for kernels, shape, most in asked:
            seconds = max(10.0, min(most, self.left() - 30))
            command = ["-m", "benchmarks.gpu.tune", *kernels, "--write", "--device", self.device, "--seconds", seconds]
            ended = self.child([*command, "--shape", *shape], seconds + 60)
            self.record["tune"] += ended.output[-8000:].splitlines()
            self.results.save()
            causes += [] if ended.status == 0 else [ended.cause]
        return "; ".join(causes) or None

    def shapes(self) -> str | None:
        causes = []
        for case in (shapes.DRY_GRID if self.args.dry_run else shapes.GRID)[1:]:
            causes.append(self.shape(case))
        return "; ".join(filter(None, causes)) or None

    def sanitizers(self) -> str | None:
        """The CUDA kernels under compute-sanitizer: what each tool ended with; 0 where it found nothing."""
        script = ["-m", "benchmarks.gpu.sanitized", "--device", self.device]
        found = self.record["sanitizers"] = {}
        checker = shutil.which("compute-sanitizer")
        if self.args.dry_run:
            found["without"] = self.child(script, 120).status
        elif checker is None:
            return "compute-sanitizer is not on PATH"
        for tool in () if self.args.dry_run else ("memcheck", "racecheck", "initcheck", "synccheck"):
            if self.left() < 20:
                return f"no time for {tool}"
            found[tool] = self.child(script, 90, under=[checker, "--tool", tool, "--error-exitcode", "99"]).status
            self.results.save()
        return None if not any(found.values()) else f"{found}"

    def shape(self, case: tuple, options: Sequence[str] = ()) -> str | None:
        shape, dtype, *_ = case
        self.results.say(f"{shape} {dtype}")
        options = [*options, "--device", self.device, *(["--rounds", 1] if self.args.dry_run else [])]
        options += ["--head", self.args.head] if self.args.head and case is not shapes.FIRST else []
        rates = self.record.get("ceilings")
        options += ["--rates", rates["flops"], rates["bandwidth"]] if rates else []
        one = shapes.ShapeRun(self.results, case, self.args.contender_limit, self.left, options)
        missing = one.measure(functools.partial(self.child, limit=self.args.budget))
        failed = shapes.failures({"shapes": [one.record]})
        return "; ".join([*failed, *(f"{shape} {dtype}: no time for {group}" for group in missing)]) or None

    def stages(self) -> dict[str, tuple[Callable[[], str | None], float]]:
        """Most important first: what it does, and the seconds without which it is not begun."""
        found = {"wheels": (self.wheels, 20)} if self.args.wheels else {}
        found["first"] = self.first, 10
        if self.args.install:
            found["install"] = self.install, 30
        names = ("ceilings", "target", "compile", "tests", "forwards", "tune", "shapes", "sanitizers")
        return found | {name: (getattr(self, name), 20) for name in names}

    def run(self) -> int:
        """0, or 1 where something of ours failed."""
        for name, (stage, seconds) in self.stages().items():
            if self.args.stages and name not in (*self.args.stages, "wheels", "install"):
                continue
            if self.results.is_done(name) and name not in ("wheels", "install"):  # it may be another machine
                self.results.say(f"{name}: done before")
                continue
            if self.left() < seconds:
                self.results.say(f"{name}: not reached")
                self.results.mark(name, "not reached")
                continue
            self.results.say(f"{name}")
            self.results.mark(name, "running")
            begin = time.monotonic()
            try:
                why = stage()
            except Stopped as signal:
                self.results.mark(name, "stopped", why=str(signal))
                self.results.say(f"{name}: stopped by {signal}")
                raise
            except Exception:
                why = traceback.format_exc()
            more = {"why": why, "seconds": round(time.monotonic() - begin, 1)}
            self.results.mark(name, "failed" if why else "done", **more)
            if why:
                self.results.say(f"{name}: {why}")
            for table in TABLES:
                self.results.copy(table)
        asked = [state["state"] for name, state in self.record["stages"].items() if name not in ("wheels", "install")]
        return 1 if "failed" in asked or shapes.failures(self.record) else 0


def _json_into(found: list) -> Callable[[str], bool]:
    def take(line: str) -> bool:
        try:
            one = json.loads(line)
        except ValueError:
            return False
        found.append(one)
        return True

    return take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("first", "ceilings", "target", "compile", "tests", "forwards", "tune", "shapes", "sanitizers")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu_output", help="folder; default: gpu_output")
    parser.add_argument("--stages", nargs="+", choices=names, help="these only, in the usual order")
    parser.add_argument("--install", action="store_true", help="pip install this checkout; needs no network")
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheels (benchmarks.gpu.wheels makes it)")
    parser.add_argument("--head", help="safetensors file with hidden, weight and labels of a trained model")
    parser.add_argument("--commit", help="what is measured, where git cannot say it")
    parser.add_argument("--contender-limit", type=float, default=120, help="seconds after which one counts as hanging")
    parser.add_argument("--dry-run", action="store_true", help="walk every stage without a GPU")
    args = parser.parse_args()
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels} is no folder")
    stop_on_signals()
    if not args.dry_run and not machine.has_gpu():
        print("no CUDA GPU here: nothing was measured (--dry-run walks the suite without one)")
        return 2
    record = {
        "title": "fastdpo GPU suite" + (" (dry run: no GPU, nothing here is a measurement)" * args.dry_run),
        "date": datetime.date.today().isoformat(),
        **machine.commit(args.commit),
        "device": {"name": "none"} if args.dry_run else machine.device(),
        "versions": machine.versions(),
        "peers": machine.peers(),
        "kernels": digests(),
    }
    try:
        results = Results(args.output, record)
    except OtherState as why:
        print(why)
        return 1
    status = 1
    try:
        status = Suite(args, results).run()
    except Stopped:
        pass
    results.save()
    print(results.summary())
    return status


if __name__ == "__main__":
    sys.exit(main())
