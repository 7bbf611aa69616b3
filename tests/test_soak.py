"""A short soak: after some hundred random steps a process holds what it held before them."""

from __future__ import annotations

import gc

import pytest
import torch
from random_steps import Steps
from soak import ALLOWED, caches, grown, held, run

import fastdpo

# Their keys are devices, types and the values of two environment variables.
FEW = {f"fastdpo.ops.engines.{name}": 12 for name in ("engine_for", "divergence_engine_for")}


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


def test_the_soak_sees_a_tensor_and_a_cache_that_grow():
    before, before_caches = held(), caches()
    fastdpo.kept = [torch.zeros(3)]
    try:
        assert any(line.startswith("tensors") for line in grown(before, held(), ALLOWED))
        assert grown(before_caches, caches(), FEW) == ["fastdpo.kept: 0 before, 1 after"]
    finally:
        del fastdpo.kept


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


@pytest.mark.parametrize("count", [3])
def test_threads_that_end_give_back_what_they_worked_in(count, seeded):
    steps = Steps(seeded)
    for _ in range(20):
        steps.of_another_thread()
    before = held()
    for _ in range(100 * count):
        steps.of_another_thread()
    assert not grown(before, held(), ALLOWED)
