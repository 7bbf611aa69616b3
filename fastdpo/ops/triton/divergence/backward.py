"""The divergence's backward: that of one head, ../backward.py, where dz is made from two."""

from __future__ import annotations

from ....head import Routing
from ...divergence.problem import DivergenceForward, DivergenceUpstream, Heads
from ...problem import Gradients, Needs, Rows
from ..backward import gradients
from .call import TwoHeads
from .dz import routed_dz
from .log_ratio import PairTerms


def backward(
    heads: Heads,
    rows: Rows,
    saved: DivergenceForward,
    upstream: DivergenceUpstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    terms = PairTerms.of(heads, saved, upstream)
    coef = upstream.coef_divergence.abs()  # of all together: only where it is 0 matters, and about how large it gets
    for other in (terms.coef, terms.coef_entropy):
        coef = coef if other is None else coef + other.abs()
    return gradients(TwoHeads(heads, rows), saved, terms, (coef, None, coef), routing, needs, sums, routed_dz)
