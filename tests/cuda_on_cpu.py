"""csrc/cuda/*.cu compiled by the C++ compiler and executed on the CPU: cuda_stand_in/ says how, and what that finds.

With FASTDPO_SANITIZE=1 under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python that SANITIZED was set for.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdpo.ops import native

CSRC = Path(__file__).parents[1] / "csrc"
STAND_IN = Path(__file__).with_name("cuda_stand_in")
NAME = "cuda_on_cpu"
LAUNCH = re.compile(r"([\w:]+(?:<[^;<>]*>)?)<<<(.+?)>>>\(")  # the one thing in these files that is not C++
FLAGS = "-O1 -g1 -std=c++17 -fPIC -Wall -Wextra -Wno-attributes -fno-math-errno -fno-gnu-unique".split()
FLAGS.append("-DFASTDPO_HAVE_CUDA")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
SANITIZE = os.environ.get("FASTDPO_SANITIZE") == "1"


class Unavailable(Exception):
    """Why nothing can be compiled here."""


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or native.build_info().get("compiler") or "c++")
    if not shutil.which(command[0]):
        raise Unavailable(f"no C++ compiler ({command[0]})")
    return command


def sanitized() -> dict[str, str]:
    """The environment of a Python whose library is sanitized; Unavailable where the compiler has no such runtime."""
    done = subprocess.run([*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(done.stdout.strip())
    if done.returncode or not runtime.is_absolute():
        raise Unavailable("the C++ compiler has no libasan.so")
    # Python keeps memory until it exits; torch's exceptions cross libraries.
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    libraries = f"{runtime.resolve()}:{libstdcxx()}"
    return {**os.environ, **options, "LD_PRELOAD": libraries, "FASTDPO_SANITIZE": "1"}


def libstdcxx() -> str:
    """Beside libasan, which looks for what throws exceptions when it starts."""
    command = [*compiler(), "-print-file-name=libstdc++.so"]
    return str(Path(subprocess.run(command, capture_output=True, text=True).stdout.strip()).resolve())


def mutated(source: str, changes: dict[str, str]) -> str:
    """`source` with each text, which must be there once, replaced."""
    for old, new in changes.items():
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    return source


def build(changes: dict[str, dict[str, str]] | None = None) -> Path:
    """The extension's path; `changes` in a copy of csrc, {file: {text: other text}}. Built once per set of sources."""
    try:
        import pybind11
    except ImportError:
        raise Unavailable("no pybind11") from None
    command, changes, flags = compiler(), changes or {}, FLAGS + SANITIZERS * SANITIZE
    includes = [STAND_IN, None, pybind11.get_include(), sysconfig.get_paths()["include"]]
    files = sorted(p for folder in (CSRC, STAND_IN) for p in folder.rglob("*") if p.is_file())
    key = hashlib.sha256(repr((command, flags, changes, includes, sys.version)).encode())
    for path in (*files, Path(__file__)):
        key.update(path.read_bytes())
    root = Path(tempfile.gettempdir()) / f"fastdpo-{NAME}-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    folder = root / key.hexdigest()[:20]
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{NAME}.so").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(CSRC, folder / "csrc")
            for name, replaced in changes.items():
                copy = folder / "csrc" / name
                copy.write_text(mutated(copy.read_text(), replaced))
            includes[1] = folder / "csrc"
            compile_in(folder, [*command, *flags, *(f"-I{path}" for path in includes)])
    return folder / f"{NAME}.so"


def compile_in(folder: Path, command: list[str]) -> None:
    objects = {folder / "module.o": STAND_IN / "module.cpp"}
    for source in sorted((folder / "csrc" / "cuda").glob("*.cu")):
        copy = folder / f"{source.stem}.cpp"
        text = LAUNCH.sub(r"stand_in::launch(\2)(\1, ", source.read_text())
        copy.write_text(f'#line 1 "{source}"\n{text}')
        objects[folder / f"{source.stem}.o"] = copy

    def run(arguments):
        done = subprocess.run([*map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        assert "warning:" not in done.stdout, done.stdout

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: run([*command, "-c", item[1], "-o", item[0]]), objects.items()))
    module, *kernels = objects
    library = folder / "libkernels.so"
    run([*command, "-shared", *kernels, "-o", library])
    made = folder / f"{NAME}.so.made"
    run([*command, "-shared", module, library, "-Wl,-rpath,$ORIGIN", "-o", made])
    made.rename(folder / f"{NAME}.so")


def load(changes: dict[str, dict[str, str]] | None = None) -> ModuleType:
    """Skips the test where nothing can be compiled; an error instead with FASTDPO_REQUIRE_NATIVE=1."""
    try:
        path = build(changes)
    except Unavailable as reason:
        if os.environ.get("FASTDPO_REQUIRE_NATIVE") == "1":
            raise
        pytest.skip(f"no CUDA kernels on the CPU: {reason}")
    spec = importlib.util.spec_from_file_location(NAME, path)
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
