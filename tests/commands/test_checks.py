"""The self-check: it passes here, and sees an engine that is off."""

from __future__ import annotations

import os

import pytest
import torch

import fastdpo
from fastdpo.commands import checks as module
from fastdpo.commands.checks import TAU, Check, Problem, checks, definition, forced
from fastdpo.ops.engines import ENGINES


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch):
    """Which is no engine that a user runs, and slow."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_every_engine_that_can_run_is_checked_and_passes():
    found = checks()
    assert [check for check in found if not check.passed] == []
    for engine in ENGINES:
        if fastdpo.backends()["engines"][engine]["available"]:
            of_engine = {check.operation for check in found if check.engine == engine}
            assert of_engine == {"linear_logps, exact", "linear_logps, routed"}
    assert {"selective_log_softmax", "preference_loss, sigmoid", "linear_divergence, exact"} <= {
        check.operation for check in found
    }
    assert all(set(check.errors) == set(check.limits) and check.errors for check in found)


def test_the_problem_is_one_that_routing_thins_out():
    problem = Problem.of(torch.float32)
    exact = problem.run(definition, torch.float64, "cpu")
    routed = problem.run(
        lambda h, w, y: fastdpo.linear_logps(h, w, y, tau=TAU, seed=1), torch.float32, "cpu"
    )  # the backward that is asked for, and not the exact one in its place
    apart = ((routed[1] - exact[1]).norm() / exact[1].norm()).item()
    assert 1e-3 < apart < 0.5
    assert (problem.labels == -100).any() and (exact[0][problem.labels == -100] == 0).all()


@pytest.mark.parametrize("what", ["logps", "dhidden", "dweight"])
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_result_is_seen(monkeypatch, what, wrong):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, forward, backward):
            ctx.backward_factor = backward
            return x * forward

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.backward_factor, None, None

    def off(hidden, weight, labels, **options):
        if hidden.dtype == torch.float64:
            return fastdpo.linear_logps(hidden, weight, labels, **options)
        hidden = Off.apply(hidden, 1.0, wrong if what == "dhidden" else 1.0)
        weight = Off.apply(weight, 1.0, wrong if what == "dweight" else 1.0)
        return Off.apply(
            fastdpo.linear_logps(hidden, weight, labels, **options), wrong if what == "logps" else 1.0, 1.0
        )

    monkeypatch.setattr(module, "linear_logps", off)
    monkeypatch.setattr(module, "OPERATIONS", {})
    found = checks()
    assert found and not any(check.passed for check in found)
    for check in found:
        off_by = {name for name, limit in check.limits.items() if not check.errors[name] <= limit}
        assert off_by == {what}


def test_what_raises_is_a_check_that_failed(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(module, "linear_logps", fails)
    monkeypatch.setattr(module, "OPERATIONS", {"selective_log_softmax": fails})
    found = checks()
    assert {check.failed for check in found} == {"RuntimeError: no kernel image"}
    assert not any(check.passed for check in found)


def test_an_engine_is_forced_for_as_long_as_it_takes(monkeypatch):
    for before in (None, "cpu"):
        monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
        if before is not None:
            monkeypatch.setenv("FASTDPO_ENGINE", before)
        with pytest.raises(KeyError), forced("reference"):
            assert os.environ["FASTDPO_ENGINE"] == "reference"
            raise KeyError
        assert os.environ.get("FASTDPO_ENGINE") == before


def test_nan_is_no_pass():
    assert not Check("x", "y", "z", {"value": float("nan")}, {"value": 1.0}).passed
    assert Check("x", "y", "z", {"value": 1.0}, {"value": 1.0}).passed
