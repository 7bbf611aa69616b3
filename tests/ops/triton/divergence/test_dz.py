"""dz of two heads whose hidden sizes and products' ends differ."""

from __future__ import annotations

import pytest
from triton_divergence_case import KINDS, Case

from fastdpo.ops.triton import backward


@pytest.mark.parametrize("routed", [None, (0.1, 0.1)], ids=["exact", "routed"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes(kind, routed, monkeypatch):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    case = Case(kind, N=11, V=261, H=37, ref_H=17, routed=routed)
    case.check(case.upstream())
