"""csrc/cuda/*.cu compiled by the C++ compiler and executed on the CPU: cuda_stand_in/ says how, and what that finds.

python -m tests.cuda_on_cpu [pytest's arguments]

runs their tests under AddressSanitizer and UndefinedBehaviorSanitizer up to the first error: a tensor is a piece of
memory of exactly its size then. Sanitized are the kernels, not torch.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdpo.ops import native

CSRC = Path(__file__).parents[1] / "csrc"
STAND_IN = Path(__file__).with_name("cuda_stand_in")
NAME = "cuda_on_cpu"
TESTS = ("ops/selective/test_logits_row.py", "ops/preference/test_preference_kernels.py")
LAUNCH = re.compile(r"([\w:]+(?:<[^;<>]*>)?)<<<(.+?)>>>\(")  # the one thing in these files that is not C++
FLAGS = "-O1 -g1 -std=c++17 -fPIC -Wall -Wextra -Wno-attributes -fno-math-errno -fno-gnu-unique".split()
FLAGS.append("-DFASTDPO_HAVE_CUDA")
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
Changes = dict[str, dict[str, str]]  # of a copy of csrc: {file: {text: other text}}
SANITIZE = os.environ.get("FASTDPO_SANITIZE") == "1"


class Unavailable(Exception):
    """Why nothing can be compiled here."""


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or native.build_info().get("compiler") or "c++")
    if not shutil.which(command[0]):
        raise Unavailable(f"no C++ compiler ({command[0]})")
    return command


def sanitized() -> dict[str, str]:
    """The environment of a Python whose kernels are sanitized; Unavailable where the compiler has no such runtime."""

    def library(name: str) -> Path:
        command = [*compiler(), f"-print-file-name={name}"]
        found = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not found.is_absolute():
            raise Unavailable(f"the C++ compiler has no {name}")
        return found.resolve()

    preload = f"{library('libasan.so')}:{library('libstdc++.so')}"  # the first looks for the second's functions
    return os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until it exits
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FASTDPO_SANITIZE": "1",
    }


def run_sanitized(*arguments: str, changes: Changes | None = None, **options) -> subprocess.CompletedProcess:
    tests = [Path(__file__).parent / name for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *map(str, tests), *arguments]
    environment = sanitized() | {"FASTDPO_CUDA_CHANGES": json.dumps(changes or {})}
    return subprocess.run(command, env=environment, cwd=CSRC.parent, text=True, **options)


def mutated(source: str, changes: dict[str, str]) -> str:
    """`source` with each text, which must be there once, replaced."""
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


def build(changes: Changes) -> Path:
    """The extension's path; with `changes` in a copy of csrc. Compiled once per set of sources."""
    try:
        import pybind11
    except ImportError:
        raise Unavailable("no pybind11") from None
    command, sanitize = [*compiler(), *FLAGS, f"-I{STAND_IN}"], SANITIZERS * SANITIZE
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_module(folder: Path) -> None:
        run([*command, *python, f"-I{CSRC}", "-c", STAND_IN / "module.cpp", "-o", folder / "module.o"])

    def compile_kernels(folder: Path, name: str, changes: Changes) -> None:
        shutil.copytree(CSRC, folder / "csrc")
        for changed, texts in changes.items():
            copy = folder / "csrc" / changed
            copy.write_text(mutated(copy.read_text(), texts))
        source = folder / "csrc" / name
        text = LAUNCH.sub(r"stand_in::launch(\2)(\1, ", source.read_text())
        source.with_suffix(".cpp").write_text(f'#line 1 "{source}"\n{text}')
        run([*command, *sanitize, f"-I{folder / 'csrc'}", "-c", source.with_suffix(".cpp"), "-o", folder / "kernels.o"])

    def objects_of(source: Path) -> Path:
        name = str(source.relative_to(CSRC))
        of_it = {file: texts for file, texts in changes.items() if file == name or not file.endswith(".cu")}
        make = functools.partial(compile_kernels, name=name, changes=of_it)
        return once(make, command, sanitize, name, of_it) / "kernels.o"

    def link(folder: Path) -> None:
        run([*command, *sanitize, "-shared", *objects, "-o", folder / "libkernels.so"])
        run([*command, *sanitize, "-shared", module, folder / "libkernels.so", "-o", folder / f"{NAME}.so"])

    module = once(compile_module, command, python) / "module.o"
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(objects_of, sorted(CSRC.glob("cuda/*.cu"))))
    return once(link, module, objects) / f"{NAME}.so"


def once(make: Callable[[Path], None], *key) -> Path:
    """The folder that `make` has filled, for these sources and this key; processes wait for the one that does."""
    digest = hashlib.sha256(repr((key, sys.version)).encode())
    files = (p for folder in (CSRC, STAND_IN) for p in folder.rglob("*") if p.is_file())
    for path in sorted((*files, Path(__file__))):
        digest.update(path.read_bytes())
    root = Path(tempfile.gettempdir()) / f"fastdpo-{NAME}-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    folder = root / digest.hexdigest()[:20]
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


def run(command: list) -> None:
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "warning:" not in done.stdout, done.stdout


def load(changes: Changes | None = None) -> ModuleType:
    """Skips the test where nothing can be compiled; an error instead with FASTDPO_REQUIRE_NATIVE=1."""
    try:
        path = build(json.loads(os.environ.get("FASTDPO_CUDA_CHANGES", "{}")) if changes is None else changes)
    except Unavailable as reason:
        if os.environ.get("FASTDPO_REQUIRE_NATIVE") == "1":
            raise
        pytest.skip(f"no CUDA kernels on the CPU: {reason}")
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.{NAME}", path)  # pybind11 knows modules by name
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Extension:
    """The native extension with these kernels in it. fp32 losses of CPU tensors are a kernel's too."""

    def __init__(self, kernels: ModuleType):
        self.kernels = kernels
        self.launched: set[str] = set()

    def __getattr__(self, name: str):
        return getattr(self.kernels if name.startswith("cuda_") else CPU, name)

    def __dir__(self):
        return sorted({*dir(CPU), *dir(self.kernels)})

    def host_preference_forward(self, is_double: bool, **fields):
        self._preference("preference_forward", is_double, fields)

    def host_preference_backward(self, is_double: bool, **fields):
        self._preference("preference_backward", is_double, fields)

    def _preference(self, name: str, is_double: bool, fields: dict):
        if is_double:  # no kernel has it
            getattr(CPU, f"host_{name}")(is_double=True, **fields)
        else:
            launch(f"cuda_{name}", torch.device("cpu"), **fields)


CPU = native.EXTENSION


def launch(name: str, device: torch.device, *, what: str = "", **fields) -> None:
    """In the place of native.launch, which asks torch for a stream."""
    assert device.type == "cpu"
    native.EXTENSION.launched.add(name)
    error = getattr(native.EXTENSION, name)(device=0, stream=0, **fields)
    if error:
        raise RuntimeError(f"{name}{what}: CUDA error {error}, {native.EXTENSION.cuda_error_text(error)}")


def install(monkeypatch, kernels: ModuleType, seed: int) -> set[str]:
    """The host's side of the CUDA kernels, for CPU tensors; the names of those that have run, as they run."""
    from fastdpo.ops import engines
    from fastdpo.ops.selective import cuda

    kernels.seed(seed % 2**32)
    extension = Extension(kernels)
    monkeypatch.setattr(native, "EXTENSION", extension)
    monkeypatch.setattr(native, "launch", launch)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(engines, "_choose_logits", lambda device, dtype: ("cuda", "a test"))
    return extension.launched


if __name__ == "__main__":
    sys.exit(run_sanitized(*sys.argv[1:]).returncode)
