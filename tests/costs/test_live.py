"""Live pairs without a head: the figures of live.json."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastdpo.costs.live import spread, trained
from fastdpo.head import DEFAULT_TAU, FROZEN_HEAD_TAU

DOCS = (Path(__file__).parents[2] / "docs" / "costs.md").read_text()


@pytest.mark.parametrize("kind, tau", [("trained", DEFAULT_TAU), ("frozen", FROZEN_HEAD_TAU)])
@pytest.mark.parametrize("scaling", ["first", "same"])
def test_as_many_as_the_documented_head_has(kind, tau, scaling):
    tokens, vocab = 8192, 131072
    (documented,) = re.findall(rf"\(8192, 131072, 4096\), {kind} head, {scaling}: ([\d.]+) of 1024", DOCS)
    kept = trained(tokens, vocab, tau, scaling)
    assert len(kept) == 1024 and kept.max() <= tokens
    assert kept.sum().item() / tokens == pytest.approx(float(documented), abs=0.06)


def test_the_larger_tau_keeps_less_of_every_block():
    assert (trained(100, 32768, FROZEN_HEAD_TAU) <= trained(100, 32768, DEFAULT_TAU) + 2).all()


def test_spread_keeps_a_tokens_blocks():
    kept = torch.tensor([0.9, 0.5, 0.1, 0.1], dtype=torch.float64)
    for scaling in ("first", "same"):
        wide = spread(kept, 16 * 128, scaling)
        assert len(wide) == 16 and wide.sum() == pytest.approx(1.6)
    assert spread(kept, 16 * 128, "first")[4:].sum() == 0
    assert spread(kept, 2 * 128, "first").tolist() == [0.9, 0.5]
    assert spread(kept, 16 * 128, "same").max() == pytest.approx(0.225)


def test_few_blocks_are_kept_by_all_tokens_at_most():
    assert trained(64, 1000, DEFAULT_TAU).max() <= 64
