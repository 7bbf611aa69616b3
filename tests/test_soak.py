"""A short soak: after some hundred random steps a process holds what it held before them. What it held must be its own:
the tests here run in a process of theirs, which other tests have left nothing in."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from random_steps import Steps
from soak import ALLOWED, caches, grown, held, run

import fastdpo

# Their keys are devices, types and the values of two environment variables.
FEW = {f"fastdpo.ops.engines.{name}": 12 for name in ("engine_for", "divergence_engine_for")}


ALONE = os.environ.get("FASTDPO_SOAK") == "1"
alone = pytest.mark.skipif(not ALONE, reason="runs in test_a_process_of_its_own")


@pytest.mark.skipif(ALONE, reason="this is that process")
def test_a_process_of_its_own(seeded):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__]
    # oneDNN, which multiplies on AMD, keeps its last 1,024 shapes, some 100 kB each: a bound, but not one to test here
    few = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
    environment = os.environ | {"FASTDPO_SOAK": "1", "FASTDPO_TEST_SEED": str(seeded)} | few
    kept_out = ("PYTEST_", "COVERAGE_")  # coverage keeps what it has seen, in memory and in an open file
    environment = {name: x for name, x in environment.items() if not name.startswith(kept_out)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


@alone
def test_random_steps_leave_no_memory_no_tensor_no_file_and_no_thread_behind(seeded):
    steps = Steps(seeded)
    try:
        from causal_models import build
    except ImportError:
        pass
    else:
        steps.with_models(build)
    run(steps, 60)
    first, first_caches = held(), caches()
    run(steps, 180)
    assert not grown(first, held(), ALLOWED)
    assert not grown(first_caches, caches(), FEW)


@alone
def test_the_soak_sees_a_tensor_and_a_cache_that_grow():
    before, before_caches = held(), caches()
    fastdpo.kept = [torch.zeros(3)]
    try:
        assert any(line.startswith("tensors") for line in grown(before, held(), ALLOWED))
        assert grown(before_caches, caches(), FEW) == ["fastdpo.kept: 0 before, 1 after"]
    finally:
        del fastdpo.kept


@alone
def test_steps_leave_no_cycle_that_keeps_a_tensor(seeded):
    """Without the collector: what a step has made dies with its last name."""
    steps = Steps(seeded)
    run(steps, 10)
    gc.collect()
    gc.disable()
    try:
        before = held_without_collecting()
        run(steps, 60)
        assert held_without_collecting() == before
    finally:
        gc.enable()


def held_without_collecting() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@alone
def test_threads_that_end_give_back_what_they_worked_in(seeded):
    steps = Steps(seeded)
    for _ in range(20):
        steps.of_another_thread()
    before = held()
    for _ in range(300):
        steps.of_another_thread()
    assert not grown(before, held(), ALLOWED)
