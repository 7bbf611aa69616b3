"""Blocks at the vocabulary's end, and heads smaller than a tile."""

from __future__ import annotations

import pytest
from triton_divergence_case import KINDS, Case

from fastdpo.head import LogitTransform


@pytest.mark.parametrize("V", [5, 128, 129])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_vocabularies(kind, V):
    transform = LogitTransform(1.0, 30.0, 1.0)
    Case(kind, N=9, V=V, H=5, ref_H=33, bias=True, transform=transform, routed=(0.3, 0.3)).check_forward()
