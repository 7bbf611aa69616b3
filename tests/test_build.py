"""The package installs from source in an isolated build, with and without a compiler, and says what it found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastdpo
from fastdpo.ops import native

ROOT = Path(__file__).parent.parent


def build_wheel(tmp_path: Path, **environment) -> zipfile.ZipFile:
    """An isolated `pip wheel` of a copy of the sources: no torch, nothing but the declared build requirements."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    skip = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "fastdpo", source / "fastdpo", ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "dist"), str(source)]
    inherited = {name: value for name, value in os.environ.items() if name != "FASTDPO_REQUIRE_NATIVE"}
    done = subprocess.run(
        command, env={**inherited, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_isolated_build_holds_the_extension(tmp_path):
    if not native.available():
        pytest.skip(f"no native extension here: {native.REASON}")
    wheel = build_wheel(tmp_path, FASTDPO_REQUIRE_NATIVE="1", FASTDPO_CUDA_ARCHS="80")
    names = wheel.namelist()
    (extension,) = (name for name in names if name.startswith("fastdpo/_C."))
    info = json.loads(wheel.read("fastdpo/_build.json"))
    assert info["native"] and info["reason"] is None
    assert info["cuda_archs"] == ([80] if info["cuda_reason"] is None else [])
    assert info["cuda_archs"] or not shutil.which("nvcc"), info["cuda_reason"]
    for package in ("ops", "ops/triton", "models", "models/lazy", "integrations", "demo"):
        assert f"fastdpo/{package}/__init__.py" in names
    if sys.platform == "linux":  # one build serves every torch
        wheel.extract(extension, tmp_path)
        linked = subprocess.run(["ldd", tmp_path / extension], capture_output=True, text=True).stdout
        assert "libc.so" in linked and "torch" not in linked and "cudart" not in linked and "gomp" not in linked


def test_without_a_compiler_the_package_is_pure_python(tmp_path):
    wheel = build_wheel(tmp_path, CXX="no-such-compiler")
    assert not any(name.startswith("fastdpo/_C.") for name in wheel.namelist())
    assert "no C++ compiler" in json.loads(wheel.read("fastdpo/_build.json"))["reason"]
    wheel.extractall(tmp_path / "site")
    script = (
        "import sys\n"  # an editable install would lend this copy its extension
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "import torch, fastdpo\n"
        "h = torch.randn(5, 8, requires_grad=True)\n"
        "fastdpo.linear_dpo_loss(h.view(1, 5, 8).repeat(2, 1, 1), torch.randn(300, 8), torch.zeros(2, 5).long())"
        ".loss.backward()\n"
        "b = fastdpo.backends()\n"
        "print(fastdpo.__file__, b['native']['available'], b['native']['reason'], b['operations']['linear_logps'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert "no C++ compiler" in done.stdout and "slower" in done.stdout and "reference" in done.stdout


def test_a_broken_compiler_fails_only_where_the_extension_is_required(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2; exit 1\n")
    broken.chmod(0o755)
    wheel = build_wheel(tmp_path, CXX=str(broken))
    assert "this compiler is broken" in json.loads(wheel.read("fastdpo/_build.json"))["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["FASTDPO_CUDA_ARCHS is empty", "cannot compile for 35", "this nvcc is broken"])
def test_without_cuda_kernels_the_rest_is_built(tmp_path, why):
    if not native.available():
        pytest.skip(f"no native extension here: {native.REASON}")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 && exit\necho this nvcc is broken; exit 1\n')
    nvcc.chmod(0o755)
    quick = tmp_path / "c++"  # what the code does is not the question here
    quick.write_text(f'#!/bin/sh\nexec {native.build_info()["compiler"]} "$@" -O0\n')
    quick.chmod(0o755)
    archs = {"FASTDPO_CUDA_ARCHS is empty": "", "cannot compile for 35": "90;35"}.get(why, "90")
    wheel = build_wheel(tmp_path, CXX=str(quick), CUDA_HOME=str(home), FASTDPO_CUDA_ARCHS=archs)
    info = json.loads(wheel.read("fastdpo/_build.json"))
    assert info["native"] and info["reason"] is None
    assert info["cuda_archs"] == [] and why in info["cuda_reason"]


def test_importing_needs_torch_alone():
    script = (
        "import sys, fastdpo\n"
        "print([m for m in ('trl', 'transformers', 'triton', 'numpy', 'peft', 'datasets') if m in sys.modules])"
    )
    lean = "import sys, torch\nprint([m for m in ('triton', 'numpy') if m in sys.modules])"  # what torch itself imports
    loaded = [
        set(eval(subprocess.run([sys.executable, "-c", s], capture_output=True, text=True, check=True).stdout))
        for s in (script, lean)
    ]
    assert loaded[0] <= loaded[1]


def test_backends_reports_engines_with_reasons():
    report = fastdpo.backends()
    assert report["operations"]["linear_logps"]["cpu"]
    for engine in report["engines"].values():
        assert engine["available"] == (engine["reason"] is None)
    json.dumps(report)  # plain values


def _pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(re.fullmatch(r"([\w.-]+)[=<>]+(\S+)", line).groups() for line in lines if line and line[0] != "#")


def test_ci_installs_what_the_constraints_say():
    locked, asked = _pins(ROOT / ".ci/lock.txt"), _pins(ROOT / "constraints.txt")
    assert {"torch", "triton", "setuptools", "pybind11", "ninja", "hypothesis"} <= locked.keys()
    installed_there = asked.keys() & locked.keys() - {"numpy"}  # not the benchmarks' and the site's; numpy has a range
    assert len(installed_there) >= 9
    assert {name: locked[name] for name in installed_there} == {name: asked[name] for name in installed_there}
    assert all("==" in line for line in (ROOT / ".ci/lock.txt").read_text().splitlines()[1:])
