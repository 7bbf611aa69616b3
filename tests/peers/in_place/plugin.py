"""A pytest plugin for a peer's own tests. FASTDPO_PEERS, a JSON object, tells it which peer, whether fastdpo stands in
its place, whether vocabularies are raised to several blocks, and where the outcome of every case goes.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

TOLD = json.loads(os.environ["FASTDPO_PEERS"])
MORE_COLUMNS = 4096  # 32 blocks beyond what the test had, whose last one keeps its width
SMALL_VOCAB = 2048  # below this a vocabulary is raised
LARGEST = 2**28  # multiply-adds of one product; larger shapes cost minutes on a CPU, and take no other path
ROUTED_ERROR = 2**-5  # at most sqrt(tau) in the mean: fastdpo/routing.py

peer = importlib.import_module(f"in_place.{TOLD['module']}")
if hasattr(peer, "prepare"):
    peer.prepare(Path(TOLD["hub"]))
outcomes: dict[str, dict] = {}
left_out: set[str] = set()
calls = 0


def count(function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)

    return counted


def count_calls() -> None:
    """Of what every public function ends in: a test that passes without one has tested nothing of ours."""
    places = ("ops.operators:engine_of", "ops.divergence.operators:divergence_engine", "selective:log_softmax_at")
    for place in (*places, "preference:batch_losses"):
        module, _, name = place.partition(":")
        module = importlib.import_module(f"fastdpo.{module}")
        setattr(module, name, count(getattr(module, name)))


def pytest_configure(config) -> None:
    parametrize = pytest.Metafunc.parametrize

    @functools.wraps(parametrize)
    def resized(self, argnames, argvalues, *args, **kwargs):
        names = [x.strip() for x in argnames.split(",")] if isinstance(argnames, str) else list(argnames)
        return parametrize(self, argnames, [fitting(names, x) for x in argvalues], *args, **kwargs)

    pytest.Metafunc.parametrize = resized
    if TOLD["routed_error"]:
        loosen()
    if TOLD["patched"]:
        count_calls()
        peer.patch(TOLD["options"])


def fitting(names: list[str], given):
    """One set of parameters: a vocabulary raised where that is asked for, marked where its products are too large."""
    marked = hasattr(given, "marks")
    values = list(given.values) if marked else list(given) if len(names) > 1 else [given]
    packed = names[0] if len(names) == 1 and names[0] in peer.SHAPES else None
    letters = peer.SHAPES[packed] if packed else names
    sizes = dict(zip(letters, values[0] if packed else values))
    if not isinstance(sizes.get("V"), int):
        return given
    if TOLD["wide"] and sizes["V"] < SMALL_VOCAB:
        sizes["V"] += MORE_COLUMNS
    values = [tuple(sizes.values())] if packed else list(sizes.values())
    work = 1
    for name in "BTNHDV":
        work *= sizes.get(name, 1)
    marks = [*(given.marks if marked else ()), *([pytest.mark.too_large] if work > LARGEST else ())]
    return pytest.param(*values, marks=marks, id=given.id if marked else None)


def loosen() -> None:
    """A routed gradient is a sample: what is as large as a vocabulary may be off by ROUTED_ERROR in L2, all else as the
    peer says."""

    def off(actual, expected) -> bool:
        if not isinstance(actual, torch.Tensor) or actual.numel() < MORE_COLUMNS or actual.shape != expected.shape:
            return True
        actual, expected = actual.double(), expected.double()
        return not (actual - expected).norm() <= ROUTED_ERROR * expected.norm()

    def either(theirs):
        @functools.wraps(theirs)
        def compare(actual, expected, *args, **kwargs):
            try:
                return theirs(actual, expected, *args, **kwargs)
            except AssertionError:
                if off(actual, expected):
                    raise

        return compare

    for place in ("torch.testing:assert_close", *peer.COMPARISONS):
        module, _, name = place.partition(":")
        module = importlib.import_module(module)
        setattr(module, name, either(getattr(module, name)))


def pytest_collection_modifyitems(config, items) -> None:
    large = [item for item in items if item.get_closest_marker("too_large")]
    left_out.update(item.nodeid for item in large)
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = calls
    try:
        return (yield)
    finally:
        outcomes.setdefault(item.nodeid, {})["calls"] = calls - before


def pytest_runtest_logreport(report) -> None:
    case = outcomes.setdefault(report.nodeid, {})
    if report.when == "call" or report.outcome != "passed":
        case["outcome"] = report.outcome if case.get("outcome") != "failed" else "failed"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            case["why"] = (crash.message if crash else str(report.longrepr))[:500]


def pytest_sessionfinish(session) -> None:
    Path(TOLD["results"]).write_text(json.dumps({"cases": outcomes, "left_out": sorted(left_out)}, indent=1))
