"""Shared by every test: the engines under test, and the seed printed when a test fails."""

from __future__ import annotations

import os
import random

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, which it decides when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastdpo

ENGINES = ("reference", "cpu", "triton")  # a new engine joins the whole suite by its name here


def _why_unavailable(name: str) -> str | None:
    return fastdpo.backends()["engines"][name]["reason"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch) -> str:
    reason = _why_unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTDPO_ENGINE", request.param)
    return request.param


@pytest.fixture(autouse=True)
def seeded(request):
    """A fresh seed per run unless FASTDPO_TEST_SEED is set; shown with a failing test's captured output."""
    seed = int(os.environ.get("FASTDPO_TEST_SEED", random.randrange(2**31)))
    print(f"FASTDPO_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed
