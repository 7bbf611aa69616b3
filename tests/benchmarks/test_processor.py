"""What measures a processor: cycles of the folds, and the loops that threads share."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from fastdpo.ops import native

if native.EXTENSION is None:
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)
from benchmarks.cpu import folds, threads


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_cycles_of_every_fold():
    best = native.EXTENSION.isa()
    found = folds.measure(best, 64, 512, 1, folds.clock())
    of = {(row["fold"], row["logits"]): row["cycles"] for row in found}
    assert all(math.isfinite(cycles) and cycles > 0 for cycles in of.values())
    assert {("log-probs", "tile"), ("log-probs", "cached"), ("dz", "tile"), ("read", "tile")} <= of.keys()


def test_loops_are_cut_for_more_threads_and_counted():
    assert [threads.busy(*x) for x in ((8, 8), (9, 8), (8, 64), (1, 1))] == [1, 9 / 16, 1 / 8, 1]
    hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (200, 1000))
    labels, fold = torch.randint(1000, (200,)), native.EXTENSION.fold
    for backward in ("routed", "exact"):
        one, many = (threads.loops(backward, n, hidden, weight, labels) for n in (1, 7))
        assert [name for name, *_ in one] == [name for name, *_ in many] and "fold" in dict(x[:2] for x in one)
        assert all(pieces >= 1 and seconds > 0 for _, seconds, pieces in (*one, *many))
    assert native.EXTENSION.fold is fold and hidden.grad is None
