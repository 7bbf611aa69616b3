"""The GPU suite: tests on the GPU engines, then every time that matters beside its floor and beside every peer.

python -m benchmarks.gpu.suite [--install] [--budget 480] [--output FILE] [--head FILE] [--tune [KERNEL ...]]
                               [--dry-run]

Most important first, each stage a process of its own; what the budget (seconds) leaves no time for is named in the
result. Writes one JSON and prints a short table. Without a GPU: exit status 2. `--dry-run` walks every stage without
one, at toy shapes in Triton's interpreter, and measures nothing that means anything.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TESTS = ["-q", "-k", "triton or cuda or gpu or kernels", "--ignore=tests/demo", "--ignore=tests/test_build.py"]
GRID = [  # (N, V, H), dtype, groups, seconds to time them in
    ((8192, 128256, 4096), "bfloat16", ("forward", "step", "backward", "frozen step", "loss", "logits"), 60),
    ((2048, 32000, 4096), "bfloat16", ("forward", "step", "backward", "frozen step", "loss", "logits"), 15),
    ((8192, 151936, 2048), "bfloat16", ("forward", "step", "backward", "frozen step"), 40),
    ((16384, 256000, 2304), "bfloat16", ("forward", "step", "backward", "frozen step", "logits"), 60),
    ((8192, 128256, 4096), "float16", ("forward", "backward"), 15),
    ((2048, 32000, 4096), "float32", ("forward", "backward", "logits"), 15),
]
DRY_GRID = [
    ((64, 384, 32), "float32", GRID[0][2], 1),
    ((32, 300, 16), "bfloat16", ("forward", "backward"), 1),
]


@dataclass
class Suite:
    args: argparse.Namespace
    deadline: float

    @property
    def device(self) -> str:
        return "cpu" if self.args.dry_run else "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(
        self, command: list, limit: float, *, interpret: bool = True, under: Sequence[str] = ()
    ) -> tuple[int, str, float]:
        """(exit status, output, seconds); 124 when it ran out of time. `interpret`: in a dry run."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("TRITON_INTERPRET", None)
        if self.args.dry_run and interpret:
            environment |= {"TRITON_INTERPRET": "1", "FASTDPO_ENGINE": "triton"}
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [*under, sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True,
                timeout=max(1.0, min(limit, self.left())),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return 124, (error.stdout or b"").decode(errors="replace"), time.monotonic() - begin
        return done.returncode, done.stdout + ("" if done.returncode == 0 else done.stderr), time.monotonic() - begin

    # Stages

    def ceilings(self) -> dict:
        status, output, _ = self.run(["-m", "benchmarks.gpu.ceilings", self.device], 60)
        return json.loads(output.splitlines()[-1]) if status == 0 else {"failed": output[-2000:]}

    def compile(self, capability: int) -> dict:
        """Every form of every kernel, in parallel, so that the tests and timings find them in Triton's cache."""
        narrow = ["--kernel", "compact", "--dtype", "bf16"] if self.args.dry_run else []
        command = ["-m", "tools.kernels", "--arch", capability, *narrow]
        status, output, seconds = self.run(command, 90, interpret=False)
        faults = [found for found in output.splitlines() if found.startswith("FAULT")]
        return {"status": status, "seconds": round(seconds, 1), "faults": faults}

    def tests(self) -> dict:
        parallel = ["-n", "8"] if importlib.util.find_spec("xdist") and not self.args.dry_run else []
        only_collect = ["--collect-only"] if self.args.dry_run else []
        status, output, seconds = self.run(["-m", "pytest", *TESTS, *parallel, *only_collect], 240)
        counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", output)}
        collected = re.search(r"(\d+)(?:/\d+)? tests collected", output)
        if collected:
            counts["collected"] = int(collected.group(1))
        failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
        record = {"status": status, "seconds": round(seconds, 1), **counts, "failures": failures}
        if status not in (0, 1):
            record["output"] = output[-2000:]
        if failures:
            print(output[-6000:], file=sys.stderr)
        return record

    def forwards(self) -> dict:
        """Which forward kernel is the faster one: the table that the library reads is written."""
        status, output, seconds = self.run(["-m", "benchmarks.gpu.forwards", "--write", "--device", self.device], 90)
        return {"status": status, "seconds": round(seconds, 1), "output": output[-2000:].splitlines()}

    def sanitizers(self) -> dict:
        """The CUDA kernels under compute-sanitizer: what each tool ended with; 0 where it found nothing."""
        script = ["-m", "benchmarks.gpu.sanitized", "--device", self.device]
        checker = shutil.which("compute-sanitizer")
        if self.args.dry_run:
            return {"without": self.run(script, 120)[0]}
        if checker is None:
            return {"left out": "compute-sanitizer is not on PATH"}
        found = {}
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            if self.left() < 20:
                found[tool] = "not reached"
                continue
            status, output, _ = self.run(script, 90, under=[checker, "--tool", tool, "--error-exitcode", "99"])
            found[tool] = status
            if status != 0:
                found[f"{tool} output"] = output[-3000:]
        return found

    def shape(self, shape, dtype: str, groups, seconds: float, rates, kernels: bool) -> dict:
        command = [
            "-m",
            "benchmarks.gpu.cases",
            *shape,
            "--dtype",
            dtype,
            "--device",
            self.device,
            "--seconds",
            seconds,
        ]
        command += ["--rates", *rates, "--groups", *groups, *(["--kernels"] if kernels else [])]
        command += ["--rounds", 1] if self.args.dry_run else []
        command += ["--head", self.args.head] if self.args.head else []
        status, output, took = self.run(command, 3 * seconds + (300 if self.args.dry_run else 90))
        if status != 0:
            return {"N": shape[0], "V": shape[1], "H": shape[2], "dtype": dtype, "failed": output[-2000:]}
        return {**json.loads(output.splitlines()[-1]), "seconds": round(took, 1)}

    def everything(self) -> dict:
        from benchmarks.gpu.measured import digests

        record = {
            "title": "fastdpo GPU suite" + (" (dry run: no GPU, nothing here is a measurement)" * self.args.dry_run),
            "date": datetime.date.today().isoformat(),
            **_commit(),
            "device": {"name": "none"} if self.args.dry_run else _device(),
            "versions": _versions(),
            "kernels": digests(),
            "not reached": [],
            "forwards": {"left out": "tests failed"},
        }
        _say("ceilings")
        record["ceilings"] = self.ceilings()
        rates = [record["ceilings"].get("flops", 785e12), record["ceilings"].get("bandwidth", 4.3e12)]
        _say("compiling")
        record["compile"] = self.compile(record["device"].get("capability", 90))
        if not self.args.skip_tests:
            _say("tests")
            record["tests"] = self.tests()
            _say(f"  {record['tests']}")
        if record.get("tests", {}).get("status", 0) == 0:
            _say("forwards")
            record["forwards"] = self.forwards()
        record["shapes"] = []
        for index, (shape, dtype, groups, seconds) in enumerate(DRY_GRID if self.args.dry_run else GRID):
            if self.left() < 30 and not self.args.dry_run:
                record["not reached"].append(f"{shape} {dtype}")
                continue
            _say(f"{shape} {dtype}")
            record["shapes"].append(self.shape(shape, dtype, groups, seconds, rates, kernels=index == 0))
        _say("sanitizers")
        record["sanitizers"] = self.sanitizers()
        return record


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> dict:
    """The commit that is measured, and whether files differ from it."""
    return {"commit": _git("rev-parse", "HEAD") or None, "changed files": _git("status", "--porcelain").splitlines()}


def _device() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": properties.major * 10 + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    from benchmarks.peers import PACKAGES

    found = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "fastdpo", "transformers", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# What it says


def targets(record: dict) -> list[tuple[str, float, float]]:
    """(what, measured, at most), of the shapes that were measured."""
    found = []
    for shape in record["shapes"]:
        groups = {name: {row["name"]: row for row in group["rows"]} for name, group in shape.get("groups", {}).items()}
        name = f"({shape['N']}, {shape['V']}, {shape['H']}) {shape['dtype']}"
        forward, step = groups.get("forward", {}), groups.get("step", {})
        if "fastdpo" in forward:
            found.append((f"{name}: forward over torch.mm", forward["fastdpo"]["over unit"], 1.10))
        logits = groups.get("logits", {})
        for part, unit in (("forward", "copy of half"), ("backward", "copy")):
            if f"fastdpo, {part}" in logits:
                ratio = logits[f"fastdpo, {part}"]["median"] / logits[unit]["median"]
                found.append((f"{name}: logits to logps, {part}, over a {unit}", ratio, 1.10))
        for kernel, (took, _) in shape.get("loss kernels", {}).items():
            found.append((f"{name}: microseconds of {kernel}, 64 sequences", took * 1e3, 15))
        routing = [row["ms"] for row in shape.get("kernels", {}).get("routed", []) if row["kernel"].startswith("list_")]
        if "fastdpo" in forward and routing and None not in routing:
            found.append((f"{name}: routing over torch.mm", sum(routing) / forward["torch.mm"]["median"], 0.03))
        if "fastdpo routed" not in step or "fastdpo exact" not in step:
            continue
        routed, exact = step["fastdpo routed"], step["fastdpo exact"]
        found.append((f"{name}: routed step over two torch.mm", routed["over unit"], 1.25))
        peers = [row for key, row in step.items() if not key.startswith("fastdpo") and key != "two torch.mm"]
        if peers:
            fastest = min(peers, key=lambda row: row["median"])
            found.append((f"{name}: exact step over {fastest['name']}", exact["median"] / fastest["median"], 1.0))
            found.append((f"{name}: routed step over {fastest['name']}", routed["median"] / fastest["median"], 1.0))
        for row in (routed, exact):
            if row["extra_mib"] is not None:
                limit = 128 + shape["N"] * 256 / 2**20
                found.append((f"{name}: MiB beyond inputs and gradients, {row['name']}", row["extra_mib"], limit))
    return found


def summary(record: dict) -> str:
    lines = [record["title"], f"{record['device']['name']}, {record['date']}, commit {record['commit']}"]
    lines += [f"tests: {record.get('tests', 'skipped')}", f"ceilings: {record['ceilings']}", ""]
    for shape in record["shapes"]:
        lines.append(f"(N, V, H) = ({shape['N']}, {shape['V']}, {shape['H']}), {shape['dtype']}")
        if "failed" in shape:
            lines.append(f"  failed: {shape['failed'][-600:]}")
            continue
        lines.append(f"  live blocks per token (dhidden, dweight): {shape['live blocks per token']}")
        for name, group in shape["groups"].items():
            lines.append(f"  {name:34} {'ms':>9} {'over unit':>9} {'floor ms':>9} {'MiB':>8} {'launches':>8}")
            for row in group["rows"]:
                launches = next(
                    (f"{row[key]:.0f}" for key in ("launches", "launches counted") if row[key] is not None), ""
                )
                floor = "" if row["floor ms"] is None else f"{row['floor ms']:.3f}"
                extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
                times = f"{row['median']:9.3f} {row['over unit']:9.3f} {floor:>9}"
                lines.append(f"    {row['name']:32} {times} {extra:>8} {launches:>8}")
        for backward, rows in shape.get("kernels", {}).items():
            lines.append(f"  kernels of a {backward} step{'ms':>26} {'floor ms':>9} {'launches':>8}")
            for row in rows:
                took = "" if row["ms"] is None else f"{row['ms']:.3f}"
                floor = f"{row['floor ms']:.3f}" if "floor ms" in row else ""
                lines.append(f"    {row['kernel']:32} {took:>9} {floor:>9} {row['launches']:8.0f}")
        lines += [f"  left out: {name}: {why}" for name, why in shape["left out"].items()]
    lines += ["", *(f"not reached: {name}" for name in record["not reached"])]
    lines.append(f"forward kernels: {record['forwards']}")
    lines.append(
        f"sanitizers: { {tool: status for tool, status in record['sanitizers'].items() if 'output' not in tool} }"
    )
    for what, value, limit in [] if record["device"]["name"] == "none" else targets(record):
        lines.append(f"{'ok  ' if value <= limit else 'MISS'} {what}: {value:.3f} (at most {limit:.2f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<date>-<device>.json")
    parser.add_argument("--head", help="safetensors file with hidden, weight and labels of a trained model")
    parser.add_argument("--install", action="store_true", help="pip install this checkout first; needs no network")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="walk every stage without a GPU")
    parser.add_argument("--tune", nargs="*", metavar="KERNEL", help="time tiles instead, of these kernels or of all")
    args = parser.parse_args()
    if not _has_gpu() and not args.dry_run:
        print("no CUDA GPU here: nothing was measured (--dry-run walks the suite without one)")
        return 2
    suite = Suite(args, time.monotonic() + args.budget)
    if args.install:
        status, output, _ = suite.run(
            ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."], 200
        )
        if status != 0:
            print(output)
            return 1
    if args.tune is not None:
        command = ["-m", "benchmarks.gpu.tune", *args.tune, "--device", suite.device, "--seconds", args.budget - 60]
        status, output, _ = suite.run(command, args.budget)
        print(output)
        return status
    record = suite.everything()
    output = args.output
    if output is None and not args.dry_run:
        name = re.sub(r"[^a-z0-9]+", "-", record["device"]["name"].lower()).strip("-")
        output = RESULTS / f"{record['date']}-{name}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record))
    failed = record["forwards"].get("status", 0) != 0
    failed = failed or any("failed" in part for part in (record["ceilings"], *record["shapes"]))
    return 1 if failed or record.get("tests", {}).get("status", 0) != 0 or record["compile"]["status"] == 124 else 0


if __name__ == "__main__":
    sys.exit(main())
