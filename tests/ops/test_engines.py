"""Which engine serves a call."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import fastdpo
from fastdpo.ops import engines

UNAVAILABLE = [
    ("triton", "cpu", "3.6.0", {}, "CUDA tensors, not cpu, unless TRITON_INTERPRET=1"),
    ("triton", "mps", "3.6.0", {"TRITON_INTERPRET": "1"}, "CUDA tensors, not mps"),
    ("triton", "cuda", None, {}, "cannot be imported"),
    ("triton", "cuda", "3.5.1", {}, "3.5.1 is older than 3.6"),
    ("triton", "cuda", "3.10.0+git", {}, None),
    ("triton", "cpu", "3.6.0", {"TRITON_INTERPRET": "1"}, None),
    ("cpu", "cuda", "3.6.0", {}, "CPU tensors, not cuda"),
    ("reference", "mps", None, {}, None),
]


@pytest.mark.parametrize("engine_name,device,version,environment,reason", UNAVAILABLE)
def test_why_an_engine_cannot_run(monkeypatch, engine_name, device, version, environment, reason):
    monkeypatch.setattr(engines, "_triton_version", lambda: version)
    problem = engines._unavailable(engine_name, torch.device(device), environment.get("TRITON_INTERPRET"))
    assert problem is None if reason is None else reason in problem


@pytest.mark.parametrize(
    "version, which",
    [
        ("3.6.0", ""),
        ("3.9.1", ""),
        ("3.7.1", "none of those"),
        ("3.10.0+git", "newer than any"),
        ("4.0", "newer than any"),
    ],
)
@pytest.mark.parametrize("forced", [None, "triton"])
def test_a_triton_whose_machine_code_nobody_checked_is_named(monkeypatch, version, which, forced):
    monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
    monkeypatch.setattr(engines, "_triton_version", lambda: version)
    if forced:
        monkeypatch.setenv("FASTDPO_ENGINE", forced)
    why = fastdpo.backends()["operations"]["linear_logps"]["cuda"]
    expected = f"; Triton {version} is {which} whose machine code was checked, 3.6 and 3.9" if which else ""
    assert why == f"triton ({'FASTDPO_ENGINE' if forced else 'fastest for cuda'}{expected})"


def test_the_checked_tritons_are_those_of_make_kernels():
    makefile = Path(__file__).parents[2] / "Makefile"
    oldest = re.search(r"^TRITON = (\S+)", makefile.read_text(), re.MULTILINE).group(1)
    assert engines.release(oldest) == engines.TRITON_VERSIONS[0]


NEWER = [  # torch, Triton, the packages that are named
    ("2.13.0", "3.9.0", []),
    ("2.15.9+cu130", "3.9.4", []),
    ("2.6.0", None, []),
    ("2.16.0.dev20261101+cpu", "3.6.0", ["torch 2.16.0.dev20261101+cpu is newer than 2.15,"]),
    ("3.0.1", "3.10.0+git", ["torch 3.0.1 is newer than 2.15,", "triton 3.10.0+git is newer than 3.9,"]),
]


@pytest.mark.parametrize("torch_version, triton_version, named", NEWER)
def test_what_came_after_the_tests_is_noted(monkeypatch, recwarn, torch_version, triton_version, named):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(engines, "_triton_version", lambda: triton_version)
    notes = fastdpo.backends()["notes"]
    assert [note.partition(" the newest")[0] for note in notes] == named
    assert not recwarn.list  # whoever asks is told; nobody else


def test_the_newest_tested_releases_are_those_of_the_newest_environment():
    """Which `make test-versions` makes."""
    from versions import VERSIONS

    pins = dict(pin.split("==") for pin in VERSIONS["newest"].pins if "==" in pin)
    newest = {name: engines.release(pins[name]) for name in ("torch", "triton")}
    assert newest == {"torch": engines.NEWEST_TORCH, "triton": engines.TRITON_VERSIONS[-1]}


def test_an_amd_gpu_is_served_by_the_reference(monkeypatch):
    """torch names it "cuda" too."""
    monkeypatch.setattr(engines, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    engine, why = engines._choose(torch.device("cuda"), torch.bfloat16, None, None)
    assert engine == "reference" and "AMD" in why
    with pytest.raises(RuntimeError, match=r"cannot run here.*AMD"):
        engines._choose(torch.device("cuda"), torch.bfloat16, "triton", None)


def test_every_gpu_of_a_host_is_asked_for_its_own_capability(monkeypatch):
    """An old card beside a new one, whichever is the current device."""
    capabilities = {0: (9, 0), 1: (7, 0), None: (9, 0)}
    monkeypatch.setattr(engines, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index])
    monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert engines._choose(torch.device("cuda", 0), torch.bfloat16, None, None)[0] == "triton"
    engine, why = engines._choose(torch.device("cuda", 1), torch.bfloat16, None, None)
    assert engine == "reference" and "below 8.0" in why
    found = fastdpo.backends()["operations"]["linear_logps"]
    assert found["cuda:0"].startswith("triton") and found["cuda:1"].startswith("reference")
    monkeypatch.setattr(engines.native, "cuda_problem", lambda capability=None: f"asked for {capability}")
    assert "(7, 0)" in engines._choose_logits(torch.device("cuda", 1), torch.float32)[1]


def test_choice_of_engine(monkeypatch):
    monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(engines, "_triton_version", lambda: "3.6.0")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    engines.engine_for.cache_clear()

    def chosen(device: torch.device, dtype: torch.dtype) -> str:
        forced, interpret = os.environ.get("FASTDPO_ENGINE"), os.environ.get("TRITON_INTERPRET")
        return engines.engine_for(device, dtype, forced, interpret).name

    assert chosen(cuda, torch.bfloat16) == "triton"
    assert chosen(cuda, torch.float64) == "reference"
    assert chosen(cpu, torch.float32) != "triton"  # the interpreter only where it is asked for
    monkeypatch.setenv("FASTDPO_ENGINE", "triton")
    assert chosen(cpu, torch.float32) == "triton"
    assert chosen(cpu, torch.float64) == "reference"
    assert engines.logits_engine(cpu, torch.float32) == (
        engines.reference.logits_forward,
        engines.reference.logits_backward,
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"FASTDPO_ENGINE=triton cannot run here.*TRITON_INTERPRET"):
        fastdpo.linear_logps(torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(6, dtype=torch.int64))
