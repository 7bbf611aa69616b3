"""What the items of the exact kernel wait for."""

from __future__ import annotations

import pytest
import torch
from heads import small_head
from triton_case import DEVICE, Case

from fastdpo.ops.problem import Needs
from fastdpo.ops.triton import exact


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.skipif(DEVICE != "cpu", reason="programs of the interpreter run one after the other")
def test_every_item_waits_for_all_that_it_needs(monkeypatch, small_workspaces, chunks):
    """In the order of the items each finds done exactly what it waits for: were that less than all of the phase, it
    would find more done."""
    waited = []

    def wait(done, least):
        waited.append((int(exact.tl.load(done).handle.data[0]), int(least.handle.data[0])))

    monkeypatch.setattr(exact, "wait", wait)
    case = Case(small_head(N=128 * chunks, V=700))
    case.check(torch.randn(128 * chunks), needs=Needs(True, chunks > 1, False, False, False))
    assert len(waited) > 5 and all(found == least > 0 for found, least in waited)
