"""`make test-versions`, or some by name: the ends of every range that is supported, in environments of their own.

An environment's Python is pyenv's, or `pythonX.Y` on PATH; one that is nowhere is said and left out. Here the newest of
everything is tested by `make test`: these are the oldest, what lies between, and what is newer than constraints.txt.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What torch's, Python's and numpy's versions could break: autograd, operators, compilation, groups, the build.
TESTS = (
    *"tests/test_logps.py tests/test_selective.py tests/test_preference.py tests/test_linear_dpo.py".split(),
    *"tests/test_divergence.py tests/test_validation.py tests/test_routing.py tests/test_layouts.py".split(),
    *"tests/test_tensors.py tests/test_accumulate.py tests/test_autograd.py tests/test_main.py".split(),
    *"tests/ops/test_operators.py tests/ops/test_native.py tests/ops/cpu tests/ops/selective".split(),
    *(f"tests/distributed/test_{name}.py" for name in ("vocab_group", "dtensor", "handshake")),
)
MODELS = (*TESTS, "tests/models/test_huggingface.py", "tests/models/lazy/test_logits.py")


@dataclass(frozen=True)
class Versions:
    python: str
    pins: tuple[str, ...]
    tests: tuple[str, ...] = TESTS


_RUNNER = ("pytest>=9", "pytest-xdist", "hypothesis", "setuptools>=77", "ninja", "pybind11")
VERSIONS = {
    # Its torch asks for Triton 3.2, which no kernel here is compiled with: the Triton engine must say so
    "oldest": Versions("3.10", ("torch==2.6.0", "numpy==1.26.4")),
    "torch-2.9": Versions("3.12", ("torch==2.9.1", "numpy", "transformers==4.57.6"), MODELS),
    "torch-2.11": Versions("3.12", ("torch==2.11.0", "numpy<2.4", "transformers"), MODELS),
    "newest": Versions("3.13", ("torch==2.15.0", "numpy<2.4", "triton==3.9.0", "transformers==5.24.0"), MODELS),
    "python-3.14": Versions("3.14", ("torch==2.15.0", "numpy<2.4", "transformers==5.24.0"), MODELS),
}


def find_python(version: str) -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))  # first: its shims on PATH may lead nowhere
    return str(found[-1]) if found else shutil.which(f"python{version}")


def made(name: str, base: str) -> Path:
    """The environment's Python, made if it is not there."""
    wanted = VERSIONS[name]
    home = Path(sys.prefix) / "versions" / name
    python, stamp, pins = home / "bin" / "python", home / "installed", "\n".join([wanted.python, *wanted.pins])
    if not stamp.exists() or stamp.read_text() != pins:
        subprocess.run([base, "-m", "venv", "--clear", home], check=True)
        pip = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*pip, *wanted.pins, *_RUNNER], check=True)
        stamp.write_text(pins)
    return python


def tested(name: str, python: Path, arguments: list[str]) -> bool:
    """Whether the tests pass with a build of this Python's own, in a copy: an extension in the tree is another's."""
    copy = Path(sys.prefix) / "versions" / f"{name}-tree"
    shutil.rmtree(copy, ignore_errors=True)
    skip = shutil.ignore_patterns(".*", "build", "*.so", "_build.json", "__pycache__", "results", "*_output")
    shutil.copytree(ROOT, copy, ignore=skip)
    variables = os.environ | {"FASTDPO_REQUIRE_NATIVE": "1", "OMP_NUM_THREADS": "1"}
    built = [python, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(built, cwd=copy, env=variables | {"FASTDPO_CUDA_ARCHS": ""}, check=True)
    versions = "import sys, torch, numpy; print(sys.version.split()[0], torch.__version__, numpy.__version__)"
    subprocess.run([python, "-c", versions], check=True)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    return subprocess.run([*pytest, *VERSIONS[name].tests, *arguments], cwd=copy, env=variables).returncode == 0


def main(arguments: list[str]) -> int:
    names = [x for x in arguments if x in VERSIONS] or list(VERSIONS)
    rest = [x for x in arguments if x not in VERSIONS]
    results = {}
    for name in names:
        base = find_python(VERSIONS[name].python)
        if base is None:
            results[name] = f"not run: no Python {VERSIONS[name].python} here"
            continue
        print(f"{name}: Python {VERSIONS[name].python}, {', '.join(VERSIONS[name].pins)}", flush=True)
        try:
            results[name] = "passed" if tested(name, made(name, base), rest) else "FAILED"
        except subprocess.CalledProcessError as error:
            results[name] = f"FAILED: {error}"
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return any(result.startswith("FAILED") for result in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
