"""Which pairs a sweep lists, and which gradient takes the second set inside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastdpo.head import Routing
from fastdpo.ops.problem import Forward
from fastdpo.ops.triton.routed_dz import Sets

FIRST, SECOND = 0, 16


@pytest.mark.parametrize(
    "taus, made, listed, inside, ratios",
    [
        ((0.1, 0.1), ("hidden", "head"), FIRST, None, (False, False)),
        ((0.2, 0.1), ("hidden", "head"), FIRST, SECOND, (True, False)),
        ((0.1, 0.2), ("hidden", "head"), FIRST, SECOND, (False, True)),
        ((0.2, 0.1), ("hidden",), SECOND, None, (False, False)),
        ((0.2, 0.1), ("head",), FIRST, None, (False, False)),
        ((0.1, 0.2), ("head",), SECOND, None, (False, False)),
        ((0.1, -1.0), ("hidden",), FIRST, None, (False, False)),
    ],
)
def test_sets(taus, made, listed, inside, ratios):
    rule = Routing.of(*taus)
    bitmap = torch.zeros(3, 16 * len(rule.taus), dtype=torch.uint8)
    sweep = SimpleNamespace(
        by_token=["dhidden"] * ("hidden" in made),
        of_head="head" in made,
        call=SimpleNamespace(num_blocks=128),
        coef=torch.ones(3),
    )
    sets = Sets.of(sweep, Forward(None, None, bitmap=bitmap), rule)
    assert sets.listed.bitmap.storage_offset() == listed and sets.listed.stride == bitmap.stride(0)
    assert (sets.inside is None) == (inside is None)
    assert inside is None or sets.inside.storage_offset() == inside
    assert (sets.ratio_hidden, sets.ratio_weight) == ratios and sets.second == (listed == SECOND)
