"""Runs the tests of trainers that cannot live in one environment: `make test-trl`, `make test-trainers`,
`make test-deepspeed`, or some of them by name.

Each gets an environment with what differs from the one that runs this; torch and the rest are shared.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = "tests/integrations"


@dataclass(frozen=True)
class Environment:
    pins: Sequence[str]  # with what they need
    tests: Sequence[str]
    alone: Sequence[str] = ()  # without: they name another torch, or CUDA packages that nothing here runs
    variables: Mapping[str, str] = field(default_factory=dict)


def _trl(release: str, *older: str, **variables: str) -> Environment:
    tests = (f"{HERE}/test_trl_releases.py", f"{HERE}/test_trl_distillers.py", "tests/models/lazy/test_logits.py")
    return Environment((f"trl=={release}", *older), tests, variables=variables)


# What else a release needs that is older. transformers 5 came after 0.28; the newest TRL is the running environment's.
TRL = {
    # Its log-prob function is Triton's alone: unpatched runs need the interpreter
    "1.15.0": _trl("1.15.0", TRITON_INTERPRET="1", FASTDPO_ENGINE="cpu"),
    "1.14.2": _trl("1.14.2"),
    "1.8.0": _trl("1.8.0", "requests"),  # GRPO and RLOO import requests without requiring it
    "1.0.0": _trl("1.0.0", "requests"),
    "0.29.1": _trl("0.29.1", "transformers==4.57.6"),
    "0.28.0": _trl("0.28.0", "transformers==4.57.6"),
    "0.24.0": _trl("0.24.0", "transformers==4.57.6"),
}
TRAINERS = {
    "llamafactory": Environment(
        (
            "trl==0.24.0 transformers==4.57.6 peft==0.18.1 datasets==4.0.0 accelerate==1.11.0 einops fastapi fire "
            "modelscope omegaconf sentencepiece sse-starlette tiktoken uvicorn scipy pandas pydantic protobuf av"
        ).split(),
        (f"{HERE}/test_llamafactory.py", f"{HERE}/test_llamafactory_itself.py"),
        ("llamafactory==0.9.5", "tyro==0.8.14", "docstring_parser", "shtab", "typeguard"),
    ),
    "ms-swift": Environment(
        (
            "trl==0.29.1 transformers==4.57.6 peft==0.20.0 datasets==4.8.4 tensorboard modelscope addict dacite einops "
            "json_repair oss2 tiktoken simplejson sortedcontainers binpacking zstandard rouge nltk fastapi uvicorn "
            "openai attrdict sentencepiece scipy"
        ).split(),
        (f"{HERE}/test_ms_swift.py",),
        ("ms-swift==4.6.0",),
    ),
    "axolotl": Environment(
        "addict fire colorama python-dotenv einops art schedulefree==1.4.1 posthog zstandard evaluate typer fastcore "
        "requests numba httpx h11".split(),
        (f"{HERE}/test_axolotl.py",),
        (
            "axolotl==0.19.0 trl==1.9.0 transformers==5.16.1 huggingface_hub==1.17.0 datasets==4.8.4 peft==0.20.0 "
            "axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6"
        ).split(),
    ),
    "openrlhf": Environment(("pylatexenc==2.11",), (f"{HERE}/test_openrlhf.py",), ("openrlhf==0.11.2",)),
    "torchtune": Environment(
        "omegaconf==2.4.0 tiktoken blobfile sentencepiece kagglehub torchdata==0.11.0".split(),
        (f"{HERE}/test_torchtune.py",),
        ("torchtune==0.6.1", "torchao==0.10.0"),
    ),
}
# Compiles nothing: what runs on CPUs needs none of its kernels
DEEPSPEED = Environment(
    ("deepspeed==0.19.8",),
    (f"{HERE}/test_deepspeed.py", "tests/distributed/test_zero.py"),
    variables={"DS_ACCELERATOR": "cpu"},
)
ENVIRONMENTS = TRL | TRAINERS | {"deepspeed": DEEPSPEED}


def python_of(name: str) -> Path:
    """The Python of environment `name`, made if it is not there."""
    wanted = ENVIRONMENTS[name]
    home = Path(sys.prefix) / "trainers" / name
    python = home / "bin" / "python"
    pins = "\n".join([*wanted.pins, *wanted.alone])
    if not (home / "installed").exists() or (home / "installed").read_text() != pins:
        venv.create(home, with_pip=True, clear=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, *wanted.pins], check=True)
        if wanted.alone:
            subprocess.run([*install, "--no-deps", *wanted.alone], check=True)
        (home / "installed").write_text(pins)
    return python


def main(arguments: list[str]) -> int:
    names = [name for given in arguments for name in {"trl": TRL, "trainers": TRAINERS}.get(given, [given])]
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown or not names:
        sys.exit(f"known are trl, trainers, {', '.join(ENVIRONMENTS)}; got {' '.join(unknown) or 'nothing'}")
    failed = []
    for name in names:
        python = python_of(name)
        print(name, flush=True)
        paths = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | ENVIRONMENTS[name].variables | {"PYTHONPATH": paths}
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ENVIRONMENTS[name].tests]
        if subprocess.run(tests, env=environment).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
