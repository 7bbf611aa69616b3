"""`python -m fastdpo doctor`."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdpo
from fastdpo.__main__ import main
from fastdpo.commands import doctor
from fastdpo.commands.checks import Check

GOOD = Check("linear_logps, exact", "cpu", "cpu, float32", {"logps": 1e-7}, {"logps": 1e-5})
BAD = Check("linear_logps, routed", "cpu", "cpu, float32", {"logps": 0.5}, {"logps": 1e-5})
RAISED = Check("linear_logps, exact", "triton", "cuda, float32", failed="RuntimeError: no kernel image")


def report(capsys, monkeypatch, results, *arguments: str) -> tuple[int, str, str]:
    """(exit status, everything, what is to be pasted)."""
    monkeypatch.setattr(doctor, "checks", lambda: results)
    status = main(["doctor", *arguments])
    text = capsys.readouterr().out
    pasted = re.search(r"----- to paste into a bug report -----\n(.*)----- until here -----\n$", text, re.S)
    return status, text, pasted[1]


def test_a_healthy_machine(capsys, monkeypatch):
    status, text, pasted = report(capsys, monkeypatch, [GOOD])
    assert status == 0 and "OFF" not in text
    assert "logps 1.0e-07 (at most 1e-05)" in text
    assert f"fastdpo {fastdpo.__version__}" in pasted and f"torch {torch.__version__}" in pasted
    assert "self-check: 1 of 1 as they should be" in pasted
    for word in ("system", "python", "CPU", "GPUs", "engine cpu", "engine triton", "native extension", "linear_logps"):
        assert word in pasted


@pytest.mark.parametrize("bad", [BAD, RAISED])
def test_what_is_off_ends_in_status_1_and_in_what_to_paste(capsys, monkeypatch, bad):
    status, text, pasted = report(capsys, monkeypatch, [GOOD, bad])
    assert status == 1
    assert "do not train with it" in text
    assert "self-check: 1 of 2" in pasted and f"OFF  {bad.operation}" in pasted
    assert (bad.failed or "logps 5.0e-01 (at most 1e-05)") in pasted


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    assert re.fullmatch(r"[1-9]\d* GiB", doctor._memory())
    monkeypatch.setattr(os, "sysconf", lambda name: int("no such name"))
    assert doctor._memory() == "unknown"


def test_no_check(capsys, monkeypatch):
    status, _, pasted = report(capsys, monkeypatch, [BAD], "--no-check")
    assert status == 0 and "self-check: not run" in pasted


def test_what_is_pasted_names_nobody(capsys, monkeypatch):
    *_, pasted = report(capsys, monkeypatch, [GOOD])
    assert sys.executable not in pasted and str(Path.home()) not in pasted
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in pasted


def test_variables_that_matter_are_shown_and_advised_on(capsys, monkeypatch):
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    _, text, pasted = report(capsys, monkeypatch, [GOOD])
    assert "FASTDPO_ENGINE=reference" in pasted
    assert "FASTDPO_ENGINE=reference is set" in text.partition("what to do")[2]


def test_remedies(monkeypatch):
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = fastdpo.backends() | {"notes": []}  # this torch may be newer than any that was tested
    found["native"] |= {"available": False, "reason": "not built"}
    assert any("C++ compiler" in line for line in doctor.remedies(found, {}))
    found["native"] |= {"available": True, "cuda_reason": "built without CUDA kernels"}
    found["engines"]["triton"] = {"available": False, "reason": "Triton 3.0 is older than 3.6"}
    assert list(doctor.remedies(found, {"trl": "1.16.0"})) == []
    assert any("0.24" in line for line in doctor.remedies(found, {"trl": "0.9.6"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    advice = " ".join(doctor.remedies(found, {}))
    assert "Triton 3.0 is older" in advice and "built without CUDA kernels" in advice


def test_a_release_that_came_after_the_tests_is_named_once(capsys, monkeypatch):
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    _, text, pasted = report(capsys, monkeypatch, [GOOD])
    assert text.partition("what to do")[2].partition("-----")[0].count("torch 2.99.0+cpu is newer than") == 1
    assert pasted.count("note: torch 2.99.0+cpu is newer than") == 1


def test_versions_come_without_importing():
    code = (
        "import sys\nfrom fastdpo.commands.doctor import installed\nfound = installed()\n"
        "print(sorted({'transformers', 'trl', 'datasets', 'matplotlib', 'rich', 'triton'} & set(sys.modules)))\n"
        "print('torch' in found)"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split("\n")[:2] == ["[]", "True"], done.stderr


def test_the_issue_forms_ask_for_it():
    forms = (Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    assert any("python -m fastdpo doctor" in form.read_text() for form in forms)
