"""Skips the wing where Triton cannot run; what makes a small problem as a large one, and torch deterministic."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreter_problem

import fastdpo

REASON = fastdpo.backends()["engines"]["triton"]["reason"] or interpreter_problem()
collect_ignore_glob = ["test_*.py", "*/test_*.py"] if REASON else []


@pytest.fixture
def small_workspaces(monkeypatch):
    """A few tokens, blocks and pairs at a time, as a large problem has them."""
    sums = 128 * 48 * 4  # of 128 tokens
    workspace = sums + 128 * 128 * 2 * 3
    sizes = {"FORWARD_HIDDEN": 1, "SUMS": sums, "WORKSPACE": workspace, "LISTS": 4 * 128 * 6}
    from fastdpo.ops.triton import memory

    for name, size in sizes.items():
        monkeypatch.setattr(memory, name, size)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
