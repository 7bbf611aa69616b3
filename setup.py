"""Builds `fastdpo._C` from csrc/ with ninja and pybind11; torch is not needed to build.

A missing toolchain piece never fails the install: without a C++ compiler the package is pure Python, and
`fastdpo/_build.json` keeps the reason for `fastdpo.backends()`. FASTDPO_REQUIRE_NATIVE=1 makes it an error.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno"]

# cpu_folds.cpp is compiled once per instruction set; csrc/cpu_dispatch.cpp picks one at run time.
X86_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}


def find_compiler():
    """The C++ compiler as an argument list, from CXX or the usual names; None when there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def find_ninja():
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


def isas():
    return X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def ninja_file(compiler, build_dir, output):
    """The text of build.ninja: one object per source (cpu_folds.cpp: one per instruction set), one link."""
    import pybind11

    names = isas()
    includes = [f"-I{CSRC.resolve()}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    available = [f"-DFASTDPO_HAVE_{name.upper()}" for name in names]
    objects = []
    edges = []

    def edge(source, object_name, flags):
        objects.append(build_dir / object_name)
        edges.append(f"build {objects[-1]}: cxx {source.resolve()}\n  flags = {shlex.join(flags)}\n")

    for source in sorted(CSRC.glob("*.cpp")):
        if source.name == "cpu_folds.cpp":
            for name, flags in names.items():
                edge(source, f"{source.stem}_{name}.o", [*flags, f"-DFASTDPO_ISA={name}"])
        else:
            edge(source, f"{source.stem}.o", available)

    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    return "\n".join(
        [
            f"cxx = {shlex.join(compiler)}",
            f"common = {shlex.join(COMMON_FLAGS + includes)}",
            "rule cxx",
            "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link\n  command = $cxx {shlex.join(link)} $in -o $out -ldl -lpthread",
            *edges,
            f"build {output}: link {' '.join(map(str, objects))}",
            "",
        ]
    )


class NativeBuild(build_ext):
    def run(self):
        info = {"native": False, "reason": None, "compiler": None, "isas": [], "cuda_archs": []}
        try:
            self.build_native(info)
        except Exception as error:  # a broken toolchain is a slower install, not a failed one
            if os.environ.get("FASTDPO_REQUIRE_NATIVE") == "1":
                raise
            info["reason"] = f"{type(error).__name__}: {error}".strip()
            message = f"fastdpo: native extension not built ({info['reason']}); the CPU path will be slower"
            print(message, file=sys.stderr)
        package_dir = Path(self.get_ext_fullpath("fastdpo._C")).parent
        package_dir.mkdir(parents=True, exist_ok=True)
        (package_dir / "_build.json").write_text(json.dumps(info, indent=1) + "\n")

    def build_native(self, info):
        compiler, ninja = find_compiler(), find_ninja()
        if compiler is None:
            raise RuntimeError("no C++ compiler found (set CXX, or install g++ or clang++)")
        if ninja is None:
            raise RuntimeError("ninja not found")
        output = Path(self.get_ext_fullpath("fastdpo._C")).resolve()
        build_dir = Path(self.build_temp).resolve()
        for folder in (build_dir, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(compiler, build_dir, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run(
            [ninja, "-C", str(build_dir), *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != 0:
            raise RuntimeError("compilation failed:\n" + done.stdout[-4000:])
        print(done.stdout)
        info.update(native=True, compiler=shlex.join(compiler), isas=list(isas()))

    def get_outputs(self):
        package_dir = Path(self.get_ext_fullpath("fastdpo._C")).parent
        extension = Path(self.get_ext_fullpath("fastdpo._C"))
        return [str(package_dir / "_build.json")] + ([str(extension)] if extension.exists() else [])


setup(ext_modules=[Extension("fastdpo._C", sources=[])], cmdclass={"build_ext": NativeBuild})
