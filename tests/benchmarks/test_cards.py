"""What serves cards that nobody tuned for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastdpo.costs.steps import Shape
from fastdpo.ops.triton.launch import Target
from tools.cards import CARDS, Sheet, estimated, row

SHAPE = Shape(2048, 32000, 1024)
LIVE = [torch.full((250,), 100.0), torch.full((250,), 80.0)]


@pytest.mark.parametrize("name", CARDS)
def test_every_card_has_something_that_serves_it(name):
    sheet = CARDS[name]
    _, _, served, tiles, *_, forward, step = row(name, sheet, SHAPE, LIVE)
    if sheet.capability < 80:
        assert "reference" in served and tiles == ""
        return
    assert "triton" in served and tiles == f"sm_{Target(sheet.capability, 1).tiles}"
    assert (forward != "") == (sheet.multiprocessors > 0)
    if forward:
        assert 1.0 <= float(forward) < 2 and 1.0 <= float(step.split()[0]) < 3


def test_the_rule_that_estimates_rates():
    gpu = estimated(Sheet(89, 10, 2e9, 1000, 100e9, 10e6))
    assert gpu.flops == pytest.approx(0.85 * 2e13) and gpu.bandwidth == pytest.approx(90e9)
    assert gpu.cache == pytest.approx(8e6) and gpu.capability == 89
