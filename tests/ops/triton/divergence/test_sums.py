"""Which sums a block leaves: only what the kind, the statistics and the routing need."""

from __future__ import annotations

import pytest
import torch
from triton_divergence_case import KINDS, Case

from fastdpo.ops.triton.divergence.sums import PairSums

WANTED = {  # (kind, routed) -> sums beside the two log-sum-exps
    ("forward_kl", False): {"ref_mean"},
    ("forward_kl", True): {"mean", "spread", "ref_mean", "ref_spread"},
    ("reverse_kl", False): {"mean"},
    ("reverse_kl", True): {"mean", "spread"},
    ("jsd", False): {"mean", "ref_mean"},
    ("jsd", True): {"mean", "spread", "ref_mean"},
}


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed(kind, routed, entropy):
    wanted = PairSums.wanted(Case(kind).heads, ("entropy",) if entropy else (), routed)
    sums = PairSums.empty(wanted, 16, 3, torch.device("cpu"))
    found = {name for name, x in sums._asdict().items() if x is not None}
    assert found == {"lse", "ref_lse"} | WANTED[kind, routed] | ({"entropy"} if entropy else set())
    assert all(x.shape == (16, 3) for x in sums if x is not None)
    assert sums.masses()[3:] == (None,) * 4 and sums.masses().lse is sums.lse
