"""Shared by every test: the engines under test, and the seed printed when a test fails."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, which it decides when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastdpo

ENGINES = ("reference", "cpu", "triton")  # a new engine joins the whole suite by its name here


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch) -> Iterator[str]:
    """Each engine in turn; the triton engine's inputs are made on the GPU where there is one."""
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    reason = fastdpo.backends()["engines"][request.param]["reason"]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTDPO_ENGINE", request.param)
    torch.set_default_device("cuda" if on_gpu else None)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def seeded(request):
    """A fresh seed per run unless FASTDPO_TEST_SEED is set; shown with a failing test's captured output."""
    seed = int(os.environ.get("FASTDPO_TEST_SEED", random.randrange(2**31)))
    print(f"FASTDPO_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed
