"""Builds `fastdpo._C` from csrc/ with ninja, pybind11 and, where there is one, nvcc; torch is not needed to build.

A missing toolchain piece never fails the install: without a C++ compiler the package is pure Python, without nvcc it
has no CUDA kernels, and `fastdpo/_build.json` keeps the reasons for `fastdpo.backends()`. FASTDPO_REQUIRE_NATIVE=1
makes code that does not compile an error.
"""

import itertools
import json
import os
import platform
import re
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
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
# The static runtime with its symbols kept inside: torch brings a runtime of its own, perhaps of another version.
NVCC_LINK = ["-shared", "-cudart", "static", "-Xlinker", "-s,--exclude-libs,ALL"]
CUDA_ARCHS = (80, 90, 100, 120)  # the default of FASTDPO_CUDA_ARCHS, as far as nvcc knows them

# cpu/folds.cpp is compiled once per instruction set; csrc/cpu/dispatch.cpp picks one at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
X86_ISAS = {
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
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


def find_nvcc():
    """The path of nvcc from CUDA_HOME, PATH or the usual place; None when there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def find_cuda():
    """(nvcc, architectures to compile for): (path, [80, 90, ...]). Raises RuntimeError with the reason for none."""
    wanted = os.environ.get("FASTDPO_CUDA_ARCHS")
    if wanted is not None and not wanted.strip():
        raise RuntimeError("FASTDPO_CUDA_ARCHS is empty")
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found (set CUDA_HOME, or put it on PATH)")
    done = subprocess.run([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    supported = {int(arch) for arch in re.findall(r"^sm_(\d+)$", done.stdout, re.MULTILINE)}
    if done.returncode != 0 or not supported:
        raise RuntimeError(f"{nvcc} is unusable: {done.stdout.strip()[-400:] or 'it lists no architectures'}")
    if wanted is None:
        archs = [arch for arch in CUDA_ARCHS if arch in supported]
        if not archs:
            raise RuntimeError(f"{nvcc} knows none of the architectures {CUDA_ARCHS}")
        return nvcc, archs
    names = re.split(r"[;,\s]+", wanted.strip(";, \t"))
    unknown = [name for name in names if not name.isdigit() or int(name) not in supported]
    if unknown:
        raise RuntimeError(f"FASTDPO_CUDA_ARCHS={wanted!r}: {nvcc} cannot compile for {', '.join(unknown)}")
    return nvcc, sorted(set(map(int, names)))


def with_ptx(archs):
    """Of which, in order, PTX is kept: the newest for GPUs to come, and those before a gap that machine code leaves.

    Machine code runs on its own major version from its minor version on, PTX on all that is newer: between 100 and 120
    are GPUs of 11.x, which compile the PTX of 100.
    """
    before_gap = [
        arch
        for arch, following in itertools.pairwise(archs)
        if following // 10 > arch // 10 + 1 or (following // 10 > arch // 10 and following % 10)
    ]
    return [*before_gap, archs[-1]]


def gencode(archs):
    """nvcc's options: machine code for each architecture, and PTX."""
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(arch, f"compute_{arch}") for arch in with_ptx(archs)]
    return [option for arch, code in targets for option in ("-gencode", f"arch=compute_{arch},code={code}")]


def isas(compiler):
    """{name: options} of the machine that is built for: not this one where _PYTHON_HOST_PLATFORM says so."""
    machine = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).rpartition("-")[2]
    if machine not in ("x86_64", "AMD64"):
        return {"baseline": []}
    return {name: flags for name, flags in X86_ISAS.items() if takes_flags(compiler, flags)}


def takes_flags(compiler, flags):
    """Whether the compiler is new enough to know them."""
    check = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return not flags or subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def file_names(*folders):
    """The compiler's options for the same bytes wherever a build lies: asserts hold the names of their files."""
    return [f"-ffile-prefix-map={folder}={name}" for name, folder in folders]


def escaped(path):
    """As build.ninja has it: of a folder with spaces, say."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(compiler, build_dir, output, nvcc=None, archs=()):
    """The text of build.ninja: one object per source (cpu/folds.cpp: one per instruction set), one link.

    Without nvcc, csrc/cuda/*.cu is left out.
    """
    import pybind11

    own, binding, python = CSRC.resolve(), pybind11.get_include(), sysconfig.get_paths()["include"]
    includes = [f"-I{own}", f"-I{binding}", f"-I{python}"]
    names = file_names(("csrc", own), ("pybind11", binding), ("python", python))
    instruction_sets = isas(compiler)
    available = [f"-DFASTDPO_HAVE_{name.upper()}" for name in instruction_sets]
    with_cuda = ["-DFASTDPO_HAVE_CUDA"] if nvcc else []
    objects = []
    edges = []

    def edge(source, object_name, flags, rule="cxx"):
        objects.append(build_dir / object_name)
        edges.append(
            f"build {escaped(objects[-1])}: {rule} {escaped(source.resolve())}\n  flags = {shlex.join(flags)}\n"
        )

    for source in sorted(CSRC.rglob("*.cpp")):
        stem = "_".join(source.relative_to(CSRC).with_suffix("").parts)
        if stem == "cpu_folds":
            for name, flags in instruction_sets.items():
                edge(source, f"{stem}_{name}.o", [*flags, f"-DFASTDPO_ISA={name}"])
        else:
            edge(source, f"{stem}.o", {"cpu_dispatch": available, "bindings": with_cuda}.get(stem, []))

    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    linker, nvcc_rule = [*compiler, *link], []
    if nvcc:
        # A compiler with options or a wrapper is not a name that nvcc takes; it then finds its own.
        host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
        linker = [nvcc, *host, *NVCC_LINK]
        compile_cu = [nvcc, *host, *NVCC_FLAGS, "-Xcompiler", names[0], includes[0], *with_cuda]
        nvcc_rule = [
            "rule nvcc",
            f"  command = {shlex.join(compile_cu)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source in sorted(CSRC.glob("cuda/*.cu")):
            edge(source, f"{source.stem}.cu.o", gencode(archs), rule="nvcc")
    return "\n".join(
        [
            f"cxx = {shlex.join(compiler)}",
            f"common = {shlex.join([*COMMON_FLAGS, *names, *includes])}",
            "rule cxx",
            "  command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            *nvcc_rule,
            f"rule link\n  command = {shlex.join(linker)} $in -o $out -ldl -lpthread",
            *edges,
            f"build {escaped(output)}: link {' '.join(map(escaped, objects))}",
            "",
        ]
    )


class NativeBuild(build_ext):
    def run(self):
        info = {"native": False, "reason": None, "compiler": None, "isas": []}
        info.update(cuda_archs=[], cuda_ptx=[], cuda_reason="the native extension is missing")
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
        cuda = self.build_with_cuda(info, compiler, ninja)
        if not cuda:
            print(f"fastdpo: no CUDA kernels ({info['cuda_reason']})", file=sys.stderr)
            self.build_with(compiler, ninja)
        info.update(native=True, compiler=shlex.join(compiler), isas=list(isas(compiler)))

    def build_with_cuda(self, info, compiler, ninja):
        """Whether it could be; the reason why not is in `info`."""
        try:
            nvcc, archs = find_cuda()
        except RuntimeError as error:
            info["cuda_reason"] = str(error)
            return False
        try:
            self.build_with(compiler, ninja, nvcc, archs)
        except RuntimeError as error:
            if os.environ.get("FASTDPO_REQUIRE_NATIVE") == "1":
                raise
            info["cuda_reason"] = f"{nvcc}: {error}"
            return False
        info.update(cuda_archs=archs, cuda_ptx=with_ptx(archs), cuda_reason=None)
        return True

    def build_with(self, compiler, ninja, nvcc=None, archs=()):
        output = Path(self.get_ext_fullpath("fastdpo._C")).resolve()
        build_dir = Path(self.build_temp).resolve()
        for folder in (build_dir, output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(compiler, build_dir, output, nvcc, archs))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        done = subprocess.run(
            [ninja, "-C", str(build_dir), *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != 0:
            raise RuntimeError("compilation failed:\n" + done.stdout[-4000:])
        print(done.stdout)

    def get_outputs(self):
        package_dir = Path(self.get_ext_fullpath("fastdpo._C")).parent
        extension = Path(self.get_ext_fullpath("fastdpo._C"))
        return [str(package_dir / "_build.json")] + ([str(extension)] if extension.exists() else [])


setup(ext_modules=[Extension("fastdpo._C", sources=[])], cmdclass={"build_ext": NativeBuild})
