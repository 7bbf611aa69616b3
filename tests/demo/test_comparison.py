"""The demo: both runs, their comparison, and what is said where it cannot run."""

import io
import json
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import fastdpo
from fastdpo.demo import comparison as demo
from fastdpo.demo import setup as demo_setup

ROOT = Path(__file__).resolve().parents[2]
start_phase = demo.start_phase


def run_module(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


class TestCommandLine:
    def test_missing_packages(self, monkeypatch, capsys):
        monkeypatch.setattr(demo, "NEEDED", ("trl", "no_such_package"))
        assert demo.main([]) == 2
        message = capsys.readouterr().err
        assert "no_such_package" in message and "pip install 'fastdpo[demo]'" in message

    @pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "0"], ["--hidden-size", "100"]])
    def test_bad_numbers(self, arguments, capsys):
        assert demo.main(arguments) == 2
        assert re.fullmatch(rf"error: {arguments[0]} must .*not {arguments[1]}\n", capsys.readouterr().err)


def start_phase_here(phase, argv, work, progress):
    """In this process, which has imported TRL: a child takes longer to do so than to train two steps."""
    if phase == "prepare":  # one child, so that its progress and its result are read
        return start_phase(phase, argv, work, progress)
    begin = time.perf_counter()
    with open(work / f"{phase}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        demo.run_phase(demo.parse_arguments([*argv, "--run", phase]))
    return json.loads((work / f"{phase}.json").read_text()), time.perf_counter() - begin


class TestChildren:
    @pytest.fixture
    def slow_child(self, monkeypatch, tmp_path):
        """In the place of Python: says one step, then takes a minute."""
        script = tmp_path / "python"
        script.write_text("#!/bin/sh\necho $$ > " + str(tmp_path / "pid") + "\necho step 1/2\nexec sleep 60\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return tmp_path

    def test_an_interrupt_ends_the_child_too(self, slow_child):
        class Progress:
            def add_task(self, name, total):
                return 0

            def update(self, task, completed, total):
                assert (completed, total) == (1, 2)
                raise KeyboardInterrupt

        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            demo.start_phase("trl", [], slow_child, Progress())
        assert time.monotonic() - begin < 30
        with pytest.raises(ProcessLookupError):
            os.kill(int((slow_child / "pid").read_text()), 0)

    def test_an_interrupt_is_status_130(self, monkeypatch):
        def interrupted(settings, argv):
            raise KeyboardInterrupt

        monkeypatch.setattr(demo, "run_demo", interrupted)
        monkeypatch.setattr(demo, "NEEDED", ())
        assert demo.main([]) == 130


@pytest.fixture(scope="module", params=["here", pytest.param("as a command", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory):
    """The whole demo, two steps with a tiny model: its folder, what it printed and what it complained of."""
    for package in demo.NEEDED:
        pytest.importorskip(package)
    output = tmp_path_factory.mktemp("demo")
    tiny = "--steps 2 --batch-size 4 --warmup-steps 3 --hidden-size 64 --layers 1 --vocab-size 4096"
    arguments = [*tiny.split(), "--backward", "exact", "--output", str(output)]
    if request.param == "as a command":
        done = run_module("fastdpo.demo", *arguments)
        status, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        said, complained = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patched, redirect_stdout(said), redirect_stderr(complained):
            patched.setattr(demo, "start_phase", start_phase_here)
            status = demo.main(arguments)
        printed, errors = said.getvalue(), complained.getvalue()
    assert status == 0, errors + "".join(log.read_text() for log in output.glob("work/*.log"))
    return output, printed, errors


class TestWholeDemo:
    def test_prints_one_line_per_phase_and_the_table(self, finished):
        _, printed, errors = finished
        lines = printed.strip().splitlines()
        assert errors == ""
        assert [line.split(":")[0] for line in lines[:3]] == list(demo.PHASES.values())
        for label in (*demo.METRICS, "head and loss", "training", "peak memory"):
            assert any(label in line for line in lines[3:]), label
        assert "curves.png" in lines[-1] and "metrics.json" in lines[-1]

    def test_metrics(self, finished):
        output, *_ = finished
        recorded = json.loads((output / "metrics.json").read_text())
        assert recorded["settings"]["backward"] == "exact" and recorded["settings"]["steps"] == 2
        for run in recorded["runs"].values():
            assert [step["step"] for step in run["steps"]] == [1, 2]
            assert set(demo.METRICS) < set(run["steps"][0])
            assert run["steps"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
            assert 0 < run["head_seconds"] < run["seconds"]
            assert sum(run["head_seconds_per_step"]) == pytest.approx(run["head_seconds"])
            assert run["peak_memory_bytes"] > 0
        assert recorded["runs"]["trl"]["steps"][1]["rewards/margins"] != 0
        assert recorded["runs"]["fastdpo"]["engine"] != "TRL" == recorded["runs"]["trl"]["engine"]
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert recorded["summary"][name]["largest_difference"] < 1e-4

    def test_curves(self, finished):
        content = (finished[0] / "curves.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000

    def test_model_and_dataset_from_disk(self, finished, tmp_path):
        """The demo's own model and a CSV file through --model and --dataset."""
        data = tmp_path / "pairs.csv"
        data.write_text("prompt,chosen,rejected\n" + "".join(f"What is {i}?,It is {i}.,No.\n" for i in range(4)))
        model = finished[0] / "work" / "model"
        arguments = [
            "--model",
            model,
            "--dataset",
            data,
            "--steps",
            1,
            "--batch-size",
            2,
            "--output",
            tmp_path,
        ]
        settings = demo.parse_arguments(list(map(str, arguments)))
        assert settings.learning_rate == 1e-6
        assert demo.prepare(settings, tmp_path) == {"pairs": 2}
        assert demo.train(settings, tmp_path, "trl")["steps"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)

    @pytest.mark.parametrize("rows, message", [(1, "less than one batch"), (2, "rejected of the dataset is empty")])
    def test_unusable_datasets(self, finished, rows, message, tmp_path):
        data = tmp_path / "pairs.csv"
        data.write_text("prompt,chosen,rejected\n" + "Why?,So.,\n" * rows)
        arguments = ["--dataset", data, "--batch-size", 2, "--output", tmp_path]
        with pytest.raises(demo_setup.DemoError, match=message):
            demo.prepare(demo.parse_arguments(list(map(str, arguments))), tmp_path)

    def test_unusable_models(self, finished, tmp_path):
        settings = demo.parse_arguments(["--model", "./no/such/model", "--output", str(tmp_path)])
        with pytest.raises(demo_setup.DemoError, match=r"--model \./no/such/model: no such folder"):
            demo.prepare(settings, tmp_path)
        settings.model = str(tmp_path)
        with pytest.raises(demo_setup.DemoError, match=re.escape(f"--model {tmp_path}: ")) as raised:
            demo.prepare(settings, tmp_path)
        assert "config.json" in str(raised.value) and "\n" not in str(raised.value)

    def test_a_trl_that_it_cannot_measure(self, finished, monkeypatch):
        import trl.trainer.utils

        settings = demo.parse_arguments(["--model", str(finished[0] / "work" / "model"), "--steps", "1"])
        settings.output = finished[0]
        monkeypatch.setattr(fastdpo, "patch_trl", lambda **options: False)
        with pytest.raises(demo_setup.DemoError, match="another library has replaced"):
            demo.train(settings, finished[0] / "work", "fastdpo")
        monkeypatch.delattr(trl.trainer.utils, "_ChunkedLogProbFunction")
        with pytest.raises(demo_setup.DemoError, match=r"needs trl>=1\.15, found "):
            demo.train(settings, finished[0] / "work", "trl")

    def test_a_mistake_costs_one_line(self, tmp_path, capsys):
        """That a child made."""
        pytest.importorskip("trl")
        assert demo.main(["--dataset", "no/such/file.jsonl", "--output", str(tmp_path)]) == 2
        assert capsys.readouterr().err == "error: --dataset no/such/file.jsonl: no such file or folder\n"

    def test_unusable_output_folder(self, tmp_path):
        pytest.importorskip("rich")
        (tmp_path / "file").write_text("")
        settings = demo.parse_arguments(["--output", str(tmp_path / "file" / "folder")])
        with pytest.raises(demo_setup.DemoError, match=r"--output .*: Not a directory"):
            demo.run_demo(settings, [])
