"""csrc/cpu and the bindings under AddressSanitizer and UndefinedBehaviorSanitizer, the threads under ThreadSanitizer,
and the CUDA kernels by their stand-in: everything that `make sanitize` runs.

python -m tests.sanitized [kernels] [threads] [extension] [fuzz] [cuda] [--minutes 5] [pytest's arguments]

    kernels     ops/cpu/kernels_test.cpp and pairs_test.cpp, without Python, under the first two
    threads     the same under the third, with the threads of csrc's own pool: OpenMP's runtime is not sanitized
    extension   the tests of the CPU engine, with an extension that is sanitized
    fuzz        fuzz_bindings with that extension, and with the CUDA kernels of cuda_on_cpu
    cuda        cuda_on_cpu

Sanitized are csrc and what is compiled with it, not torch: a tensor is a piece of memory of its size then.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import cuda_on_cpu, fuzz_bindings
from tests.cuda_on_cpu import CSRC, compiler, once, run
from tests.sanitized_extension import VARIABLE

ROOT = CSRC.parent
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREAD = ["-fsanitize=thread"]
FLAGS = ["-O1", "-g1", "-std=c++17", "-fPIC", "-fno-math-errno", f"-I{CSRC}"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
ISAS = {  # setup.py's
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}
TESTS = ("ops/test_native.py", "ops/cpu", "ops/divergence", "ops/preference", "ops/selective/test_cpu.py")
NOT_HERE = "triton or reference or test_kernels"  # nothing of csrc in it, or programs of their own
PARTS = ("kernels", "threads", "extension", "fuzz", "cuda")


def objects(sanitize: list[str], bindings: bool, isas: dict[str, list[str]]) -> list[Path]:
    """Of every source of the CPU, compiled once."""
    available = [f"-DFASTDPO_HAVE_{name.upper()}" for name in isas]
    sources = [(CSRC / "cpu/folds.cpp", [f"-DFASTDPO_ISA={name}", *flags]) for name, flags in isas.items()]
    others = [path for path in sorted(CSRC.glob("cpu/*.cpp")) if path.stem != "folds"]
    sources += [(path, available if path.stem == "dispatch" else []) for path in others]
    if bindings:
        import pybind11

        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        # pybind11's classes are also those of libraries that are not sanitized
        sources.append((CSRC / "bindings.cpp", ["-fvisibility=hidden", "-fno-sanitize=vptr", *python]))

    def compiled(source: tuple[Path, list[str]]) -> Path:
        path, flags = source
        command = [*compiler(), *FLAGS, *sanitize, *flags, "-c", path, "-o"]
        return once(lambda folder: run([*command, folder / "made.o"]), *command) / "made.o"

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


def isas() -> dict[str, list[str]]:
    return ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def extension() -> Path:
    made = objects(ADDRESS, True, isas())
    command = [*compiler(), *ADDRESS, "-shared", *made, "-ldl", "-lpthread", "-o"]
    return once(lambda folder: run([*command, folder / "_C.so"]), *command) / "_C.so"


def run_kernels(sanitize: list[str]) -> int:
    """The C++ programs, with every instruction set of this processor."""
    made, status = objects(sanitize, False, isas()), 0
    options = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    for name in ("kernels_test", "pairs_test"):
        source = Path(__file__).parent / f"ops/cpu/{name}.cpp"
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / name
            run([*compiler(), *FLAGS, *sanitize, "-rdynamic", *made, source, "-o", program, "-ldl", "-lpthread"])
            status = status or subprocess.run([program], env=options).returncode
    return status


def environment() -> dict[str, str]:
    """Of a Python that loads the sanitized extension."""
    return cuda_on_cpu.sanitized() | {VARIABLE: str(extension())}


def run_tests(arguments: list[str]) -> int:
    tests = [str(Path(__file__).parent / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.sanitized_extension"]
    given = arguments or ["-k", f"not ({NOT_HERE})"]
    return subprocess.run([*command, *tests, *given], env=environment(), cwd=ROOT).returncode


def run_fuzz(minutes: float) -> int:
    status = 0
    for kind in ([], ["--cuda"]):
        seed = random.randrange(2**31)
        failed, output = fuzz_bindings.fuzz(seed, "--minutes", str(minutes / 2), *kind, environment=environment())
        print(output, end="", flush=True)
        status = status or failed
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of fuzzing")
    given, rest = parser.parse_known_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    steps = {
        "kernels": lambda: run_kernels(ADDRESS),
        "threads": lambda: run_kernels(THREAD),
        "extension": lambda: run_tests(rest),
        "fuzz": lambda: run_fuzz(given.minutes),
        "cuda": lambda: cuda_on_cpu.run_sanitized(*rest).returncode,
    }
    failed = []
    for part in given.parts or PARTS:
        print(f"{part}:", flush=True)
        if steps[part]():
            failed.append(part)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
