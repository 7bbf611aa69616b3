"""The GPU suite under faults: what was measured before one is on disk, its cause is printed, the rest is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
from interpreter import interpreter_problem

if interpreter_problem():
    pytest.skip(interpreter_problem(), allow_module_level=True)
ROOT = Path(__file__).parents[2]

# Comes before a worker's own code: peers that are not installed, that raise, hang, crash, or lose the GPU; ours raises.
FAULTS = """
import sys
if "benchmarks.gpu.worker" in sys.orig_argv:
    import os, signal, time
    sys.modules["liger_kernel"] = None
    from benchmarks import peers
    from benchmarks.gpu import timing

    def fails(*inputs):
        raise ValueError("bad shape")

    def loses(*inputs):
        raise RuntimeError("illegal memory access")

    def hangs(*inputs):
        time.sleep(1000)

    def crashes(*inputs):
        os.kill(os.getpid(), signal.SIGSEGV)

    timing.gpu_is_lost = lambda device: "illegal" in str(sys.exc_info()[1])
    keep = {name: peers.TOKEN_LOGPS[name] for name in ("eager", "fastdpo")}
    peers.TOKEN_LOGPS.clear()
    peers.TOKEN_LOGPS.update(fails=fails, loses=loses, hangs=hangs, crashes=crashes, **keep)
    keep = {name: peers.PEERS[name] for name in ("eager", "liger", "fastdpo exact")}
    peers.PEERS.clear()
    peers.PEERS.update(keep)
    peers.PEERS["fastdpo routed"] = fails
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    path = os.pathsep.join([str(ROOT), str(tmp_path / "faults"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "FASTDPO_ENGINE": "triton"}


def suite(folder: Path, *options, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--dry-run", "--output", folder, *options]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def record_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def until(holds, folder: Path, seconds: float = 300.0) -> dict:
    """The first result that it holds for; each on the way can be read."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (folder / "result.json").exists() and holds(record := record_of(folder)):
            return record
        time.sleep(0.02)
    raise AssertionError(f"never: {(folder / 'log.txt').read_text()}")


@pytest.mark.slow
def test_a_fault_of_one_contender_leaves_all_others(environment, tmp_path, capfd):
    from benchmarks.gpu.processes import run
    from benchmarks.gpu.results import Results
    from benchmarks.gpu.shapes import ShapeRun, failures

    record = {"title": "faults", "device": {"name": "none"}, "date": "2026-01-01", "commit": "unknown"}
    results = Results(tmp_path / "out", record)
    case = (32, 300, 32), "float32", ("errors", "forward", "step"), 1
    one = ShapeRun(results, case, 5.0, lambda: 100.0, ["--device", "cpu", "--rounds", "1"])

    def start(command, **hooks):
        command = [sys.executable, *map(str, command)]
        return run(command, limit=100, environment=environment, folder=ROOT, show=results.say, **hooks)

    assert one.measure(start) == []
    shape, printed = record_of(tmp_path / "out")["shapes"][0], capfd.readouterr().err
    seen = {group: {row["name"] for row in shape["groups"][group]["rows"]} for group in shape["groups"]}
    assert seen["forward"] == {"torch.mm", "fastdpo", "fastdpo, for a routed backward", "eager"}
    assert seen["step"] == {"two torch.mm", "fastdpo exact", "eager"}
    assert len(shape["errors"]) == 6 and shape["first figures"] == {}
    why = {name.partition("/")[2]: reason for name, reason in shape["left out"].items()}
    assert why["fails"] == "ValueError: bad shape" and "not installed" in why["liger"]
    assert why["loses"] == "RuntimeError: illegal memory access" and "killed" in why["hangs"]
    assert "exit status -11" in why["crashes"]
    assert all(reason in printed for reason in why.values()) and "serves this process no more" in printed
    assert set(shape["failed"]) == {"step/fastdpo routed"} and failures(results.record)
    assert 'raise ValueError("bad shape")' in shape["failed"]["step/fastdpo routed"]["trace"]
    assert 'raise ValueError("bad shape")' in printed


@pytest.mark.slow
def test_what_was_measured_outlives_a_kill_and_a_second_run_goes_on(tmp_path):
    options = "--stages", "first", "target"
    killed = suite(tmp_path, *options)
    before = until(lambda record: len(record["shapes"]) == 2 and record["shapes"][1].get("ended"), tmp_path)
    killed.kill()
    killed.wait()
    record = record_of(tmp_path)
    assert record["shapes"][0] == before["shapes"][0] and record["stages"]["target"]["state"] == "running"
    assert "FAILED" not in (tmp_path / "summary.txt").read_text()

    again = suite(tmp_path, *options)
    log = tmp_path / "log.txt"
    until(lambda record: "at first" in log.read_text().partition("first: done before")[2], tmp_path)
    again.send_signal(signal.SIGTERM)
    printed, _ = again.communicate(timeout=20)
    record = record_of(tmp_path)
    assert again.returncode == 1 and "first: done before" in printed and "target: stopped by SIGTERM" in printed
    assert record["shapes"][0] == before["shapes"][0] and record["runs"] == 2
    assert record["shapes"][1]["errors"] == before["shapes"][1]["errors"]  # not measured again
    assert record["stages"]["target"] == {"state": "stopped", "why": "SIGTERM"}
    other = suite(tmp_path, *options, "--commit", "another")
    assert "another commit: name another folder" in other.communicate()[0] and other.returncode == 1


def test_a_machine_without_tools_or_peers(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1-py3-none-any.whl").write_text("no wheel")
    (tmp_path / "empty").mkdir()
    options = "--wheels", tmp_path / "wheels", "--stages", "ceilings", "--budget", "90"
    done = suite(tmp_path / "out", *options, PATH=str(tmp_path / "empty"))
    printed, _ = done.communicate()
    record = record_of(tmp_path / "out")
    assert record["commit"] == record["changed files"] == "unknown" and record["ceilings"]["flops"] > 0
    assert "broken" in printed and (tmp_path / "out" / "tuned.json").exists()


def test_a_table_that_was_measured_reaches_a_fresh_machine(tmp_path):
    from benchmarks.gpu.results import Results

    results = Results(tmp_path / "out", {"title": "a", "device": {"name": "none"}, "date": "2026-01-01", "commit": "b"})
    measured, fresh = tmp_path / "tuned.json", tmp_path / "fresh" / "tuned.json"
    fresh.parent.mkdir()
    measured.write_text("[1]")
    fresh.write_text("[]")
    results.restore(fresh)  # nothing is known yet
    assert fresh.read_text() == "[]"
    results.copy(measured)
    results.restore(fresh)
    assert fresh.read_text() == "[1]"


def test_nothing_is_begun_that_the_budget_cannot_hold(tmp_path):
    done = suite(tmp_path, "--stages", "first", "tests", "--budget", "1")
    assert "tests: not reached" in done.communicate()[0] and done.returncode == 0
    assert {stage["state"] for stage in record_of(tmp_path)["stages"].values()} == {"not reached"}


def test_a_child_that_hangs_is_killed_with_all_that_it_started(tmp_path):
    from benchmarks.gpu.processes import TIMED_OUT, run

    script = "import subprocess, time; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); time.sleep(1000)"
    shown = []
    ended = run([sys.executable, "-c", script], limit=2.0, environment=os.environ, folder=tmp_path, show=shown.append)
    assert ended.status == TIMED_OUT and ended.seconds < 10 and "killed" in ended.cause
    child = Path(f"/proc/{shown[0]}/status")
    assert not child.exists() or "zombie" in child.read_text()
    absent = run(["/no/such/tool"], limit=2.0, environment=os.environ, folder=tmp_path, show=shown.append)
    assert absent.status == 127 and "/no/such/tool" in shown[-1]


def test_an_empty_trace_leaves_the_time_of_the_whole_run(monkeypatch):
    from benchmarks.gpu import cases, timing, tune
    from fastdpo.costs.steps import Shape
    from fastdpo.ops.triton.launch import Target

    for module in (cases, timing, tune):
        monkeypatch.setattr(module, "kernel_times", lambda run, runs=1: {})
    for module in (cases, tune):
        monkeypatch.setattr(module, "elapsed", lambda run, device: 7.5)
    assert timing.launches_of(lambda: None, "cuda") is None
    timed, clock = tune.clock_of("fold", lambda: None, "cuda")
    assert timed == "the whole run" and clock() == 7.5
    import torch

    one = cases.ShapeCases(Shape(32, 300, 32, torch.float32), "cpu", Target(90, 132))
    monkeypatch.setattr(one, "device", "cuda")
    rows = one.kernels("exact", None)
    whole = [row for row in rows if "trace is empty" in row["kernel"]]
    assert [row["ms"] for row in whole] == [7.5] and all(row["ms"] is None for row in rows if row not in whole)


def test_a_tile_with_other_results_cannot_win(monkeypatch):
    import torch

    from benchmarks.gpu import tune
    from fastdpo.ops.triton import launch
    from fastdpo.ops.triton.launch import Target, Tile

    target = Target(90, 132)
    right, wrong, refused = (Tile(m, 64, 32, 4, 2) for m in (16, 32, 64))

    def run():
        tile = launch.tile("fold", target, "half")
        if tile == refused:
            raise RuntimeError("too much shared memory")
        out = torch.ones(8, 4)
        out[5, 2] += 0.2 * (tile == wrong)
        return out

    before = dict(launch.tuned())
    results, present, _ = tune.tune("fold", [right, wrong, refused], run, target, "half", "cpu", time.monotonic() + 60)
    found = {tile: took for took, tile in results}
    assert isinstance(found[right], float) and isinstance(found[present], float)
    assert found[wrong].startswith("differs by 0.1") and found[refused] == "RuntimeError: too much shared memory"
    assert launch.tuned() == before


def test_the_fastest_tiles_are_written_once_each(monkeypatch, tmp_path):
    from benchmarks.gpu import tune
    from fastdpo.ops.triton import launch

    monkeypatch.setattr(launch, "TUNED", tmp_path / "tuned.json")
    launch.TUNED.write_text("[]")
    entry = {"kernel": "fold", "kind": "half", "capability": 90, "triton": "3.6.0", "ms": 2.0}
    tune.write(entry)
    tune.write({**entry, "kind": "short"})
    tune.write({**entry, "ms": 1.0, "triton": "3.6.1"})
    found = json.loads(launch.TUNED.read_text())
    assert [(one["kind"], one["ms"]) for one in found] == [("half", 1.0), ("short", 2.0)]
    launch.tuned.cache_clear()


@pytest.mark.parametrize(("numpy", "triton", "runs"), [("2.4.1", "3.6.0", False), ("2.3.5", "3.6.0", True)])
def test_an_interpreter_that_numpy_is_too_new_for_is_named(monkeypatch, numpy, triton, runs):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for package, version in (("numpy", numpy), ("triton", triton)):
        monkeypatch.setattr(f"{package}.__version__", version)
    problem = interpreter_problem()
    assert problem is None if runs else "Triton 3.6.0 needs numpy<2.4, this is 2.4.1" in problem
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # on a GPU
    assert interpreter_problem() is None


def test_a_folder_becomes_the_committed_result(tmp_path):
    from benchmarks.gpu.measured import keep

    for folder in ("run", "results", "tables"):
        (tmp_path / folder).mkdir()
    record = {"date": "2026-01-02", "device": {"name": "NVIDIA H100 80GB HBM3"}}
    (tmp_path / "run" / "result.json").write_text(json.dumps(record))
    (tmp_path / "run" / "tuned.json").write_text("[]")
    written = keep(tmp_path / "run", tmp_path / "results", tmp_path / "tables")
    assert [file.name for file in written] == ["2026-01-02-nvidia-h100-80gb-hbm3.json", "tuned.json"]
    assert json.loads(written[0].read_text()) == record and written[1].exists()
    (tmp_path / "run" / "result.json").write_text(json.dumps({**record, "device": {"name": "none"}}))
    with pytest.raises(ValueError, match="dry run"):
        keep(tmp_path / "run", tmp_path / "results", tmp_path / "tables")


def test_the_wheels_are_those_of_the_benchmarks():
    """Pinned there, or chosen with the other versions."""
    from benchmarks.peers import WHEELS

    pinned = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text()
    own_needs = ("psutil", "einops")
    assert all(wheel in pinned for wheel in WHEELS if not wheel.startswith(own_needs))
