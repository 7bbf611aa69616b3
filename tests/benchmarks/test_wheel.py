"""tools/wheel.py: which Pythons it builds for, and that the same sources are the same bytes wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastdpo.ops import native
from tools import wheel

ROOT = Path(__file__).parents[2]


def interpreter(folder: Path, name: str, answer) -> Path:
    """A command that answers as one; None: that fails, as a shim of pyenv without a version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        "#!/bin/sh\n" + ("exit 127\n" if answer is None else f"echo '{json.dumps([*answer, str(path)])}'\n")
    )
    path.chmod(0o755)
    return path


def test_one_python_of_each_version_that_the_package_takes(tmp_path, monkeypatch):
    on_path = tmp_path / "bin"
    for name, answer in {
        "python3.9": ["cpython", [3, 9], False, ".so"],
        "python3.12": ["cpython", [3, 12], False, ".so"],
        "python3.13": None,
        "python3.14": ["pypy", [3, 14], False, ".so"],
        "python3.14t": ["cpython", [3, 14], True, ".so"],
    }.items():
        interpreter(on_path, name, answer)
    of_pyenv = interpreter(tmp_path / "pyenv/versions/3.13.1/bin", "python", ["cpython", [3, 13], False, ".so"])
    interpreter(tmp_path / "pyenv/versions/3.12.9/bin", "python", ["cpython", [3, 12], False, ".so"])
    monkeypatch.setenv("PATH", str(on_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    own = interpreter(tmp_path, "own", ["cpython", [3, 30], False, ".so"])
    monkeypatch.setattr(wheel.sys, "executable", str(own))
    found = wheel.pythons(None)
    versions = {(python.version[1], python.free_threaded): python.command for python in found}
    assert versions.keys() == {(12, False), (13, False), (14, True), (30, False)}
    assert versions[12, False] == str(on_path / "python3.12") and versions[30, False] == str(own)
    assert versions[13, False] == str(of_pyenv)
    with pytest.raises(ValueError, match=r"--python .*python3\.9: no CPython that fastdpo supports"):
        wheel.pythons([str(own), str(on_path / "python3.9")])


def test_the_date_is_given_or_the_last_commits(monkeypatch, tmp_path):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert wheel.epoch() == "1700000000"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    monkeypatch.setattr(wheel, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="SOURCE_DATE_EPOCH must be set"):
        wheel.epoch()


def test_sources_hold_what_a_build_reads_and_nothing_made(tmp_path):
    names = {str(path.relative_to(tmp_path / "x")) for path in wheel.source_tree(tmp_path / "x").rglob("*")}
    assert {"setup.py", "csrc/bindings.cpp", "csrc/cuda/logits.cu", "fastdpo/py.typed"} <= names
    assert not [name for name in names if re.search(r"\.so$|_build\.json|__pycache__", name)]
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert "graft csrc" in manifest


@pytest.mark.slow
def test_the_same_sources_are_the_same_bytes_in_any_folder(tmp_path, monkeypatch):
    if native.EXTENSION is None:
        pytest.skip(f"no native extension here: {native.REASON}")
    quick = tmp_path / "c++"  # as fast as it goes: the question is what of the folder gets into the file
    quick.write_text(f'#!/bin/sh\nexec {native.build_info()["compiler"]} "$@" -O0\n')
    quick.chmod(0o755)
    monkeypatch.setenv("CXX", str(quick))
    monkeypatch.setenv("FASTDPO_CUDA_ARCHS", "")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    wheel.variables.cache_clear()
    python = wheel.asked(sys.executable)
    made = []
    for name in ("a", "another/folder with a longer name"):
        folder = tmp_path / name
        path = wheel.built(python, wheel.source_tree(folder / "source"), folder / "wheels")
        made.append(path)
        shutil.rmtree(folder / "source")
    wheel.variables.cache_clear()
    contents = []
    for path in made:
        with zipfile.ZipFile(path) as archive:
            contents.append({name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()})
    assert contents[0] == contents[1]
    assert made[0].read_bytes() == made[1].read_bytes() and made[0].name == made[1].name
    (extension,) = (name for name in contents[0] if name.startswith("fastdpo/_C."))
    assert str(tmp_path).encode() not in zipfile.ZipFile(made[0]).read(extension)
    assert "fastdpo/py.typed" in contents[0]


def test_a_python_that_is_named_is_found_for_pip_too(monkeypatch):
    """Which takes a path, and not a name on PATH."""
    here = Path(sys.executable)
    monkeypatch.setenv("PATH", os.pathsep.join([str(here.parent), os.environ["PATH"]]))
    (python,) = wheel.pythons([here.name])
    assert Path(python.command).is_absolute() and python.version == sys.version_info[:2]
    found = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python.command, "--version"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
