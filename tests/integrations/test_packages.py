"""Packages of a user's environment that are missing, or raise when they are imported: each in turn, in a process of its
own, which this file is when it is run. Nothing of fastdpo may fail by it but patch_trl, where TRL cannot be imported.
"""

import builtins
import importlib
import importlib.machinery
import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stdout

import pytest

PACKAGES = (
    "numpy", "PIL", "accelerate", "datasets", "deepspeed", "liger_kernel", "matplotlib", "peft", "rich", "tokenizers",
    "transformers", "triton", "trl", "unsloth",
)  # fmt: skip
# As packages fail that were built for another torch, Python or GPU; the packages take turns
BROKEN = ("ImportError", "RuntimeError", "AttributeError", "OSError")
CASES = [(package, "") for package in PACKAGES]
CASES += [(package, BROKEN[i % 4]) for i, package in enumerate(PACKAGES[1:])]  # torch imports numpy


@pytest.fixture(scope="module")
def outcomes() -> dict:
    """What went wrong in each case; two at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_one_package_at_a_time(case, outcomes):
    assert outcomes[case] == ""


class Unimportable:
    """In the place of Python's own finder: `package` is not there, or raises `error` when it is imported."""

    def __init__(self, package: str, error: str):
        self.package, self.error = package, error

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != self.package:
            return importlib.machinery.PathFinder.find_spec(name, path, target)
        return importlib.machinery.ModuleSpec(name, self) if self.error else None

    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise getattr(builtins, self.error)(f"{self.package} does not fit this machine")


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def without(package: str, error: str) -> None:
    place = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[place] = Unimportable(package, error)
    import torch

    import fastdpo

    hidden, weight = torch.randn(3, 16, requires_grad=True), torch.randn(300, 16)
    fastdpo.linear_logps(hidden, weight, torch.arange(3)).sum().backward()
    assert hidden.grad.isfinite().all()
    fastdpo.backends()
    runpy.run_module("fastdpo", run_name="__main__")
    fastdpo.unpatch_trl()
    patch_a_model(fastdpo)
    try:
        fastdpo.patch_trl()
    except ImportError as refused:
        assert "TRL" in str(refused) and not importable("trl.trainer.utils")
    else:
        from trl.trainer import utils

        hidden, targets = torch.randn(3, 16, requires_grad=True), torch.arange(3)
        arguments = (hidden, weight, None, targets, 1.0, 128, None, 1.0, ("log_probs",))
        assert type(utils._ChunkedLogProbFunction).__module__.startswith("fastdpo.")
        utils._ChunkedLogProbFunction.apply(*arguments)[0].sum().backward()
    fastdpo.unpatch_trl()


def patch_a_model(fastdpo) -> None:
    import torch

    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except Exception:
        return
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    importable("peft")  # a broken one leaves parts of itself behind
    ids = torch.arange(8)[None]
    fastdpo.patch_model(model)
    model(ids, labels=ids, fastdpo=True).logps.sum().backward()
    fastdpo.unpatch_model(model)
    with fastdpo.integrations.lazy_logits(model):
        model(ids).logits.log_softmax(-1).gather(-1, ids[..., None]).sum().backward()


def outcome(case: tuple[str, str]) -> str:
    try:
        with redirect_stdout(io.StringIO()):
            without(*case)
    except BaseException:
        return traceback.format_exc()
    return ""


def outcomes_of(cases: list) -> list[str]:
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        return pool.map(outcome, cases, chunksize=1)


if __name__ == "__main__":
    found = outcomes_of(CASES[:1])
    importlib.import_module("fastdpo")  # a second less in each of the others, which torch's imports do not touch
    print(json.dumps(found + outcomes_of(CASES[1:])))
