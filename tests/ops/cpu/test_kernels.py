"""The CPU's kernels without Python, by every compiler and for every processor that can be had here.

An aarch64 compiler and qemu's user mode (Debian: g++-aarch64-linux-gnu, qemu-user) run those for Graviton and Apple.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FLAGS = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]
COMPILERS = {
    "gcc": (["g++"], []),
    "clang": (["clang++"], []),
    "aarch64": (["aarch64-linux-gnu-g++"], ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
    "aarch64, clang": (["clang++", "--target=aarch64-linux-gnu"], ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", COMPILERS)
@pytest.mark.parametrize("test", ["kernels_test", "pairs_test"])
def test_values_and_gradients_of_the_baseline(test, which, tmp_path):
    compiler, runner = COMPILERS[which]
    needed = [compiler[0], *runner[:1], *(["aarch64-linux-gnu-g++"] if "aarch64" in which else [])]
    missing = [tool for tool in needed if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found")

    def run(*command) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folds = tmp_path / "folds.o"
    run(*compiler, *FLAGS, "-DFASTDPO_ISA=baseline", "-c", ROOT / "csrc/cpu/folds.cpp", "-o", folds)
    sources = [source for source in (ROOT / "csrc/cpu").glob("*.cpp") if source.stem not in ("folds", "preference")]
    program = tmp_path / "kernels"
    source = Path(__file__).with_name(f"{test}.cpp")
    run(*compiler, *FLAGS, "-rdynamic", folds, *sources, source, "-o", program, "-lpthread", "-ldl")
    assert run(*runner, program, *(["emulated"] if runner else [])) == "baseline: 0 failures\n"
