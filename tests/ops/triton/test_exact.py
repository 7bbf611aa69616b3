"""The exact products, of both upstream gradients."""

from __future__ import annotations

import pytest
import torch
from heads import small_head
from triton_case import DEVICE, Case

from fastdpo.ops.problem import Needs, Upstream
from fastdpo.ops.triton import backward
from fastdpo.ops.triton.forward import forward


def test_entropy_gradient_of_rows_without_a_logp_gradient():
    head = small_head(N=40, V=700, bias=True, masked=True)
    coef = torch.randn(40)
    coef[::3] = 0
    Case(head, softcap=5.0).check(coef, torch.randn(40))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "transform",
    [{"scale": 1.3, "temperature": 0.6}, {"scale": -0.7}, {"scale": -0.5, "softcap": 4.0, "temperature": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("V, labels", [(700, (0, 700)), (768, (130, 140)), (640, (637, 640))])
def test_blocks_with_and_without_labels(V, labels, transform, entropy):
    """A block whose rows all have their label there, others without any, and the vocabulary's edge."""
    head = small_head(N=40, V=V, bias=True)
    head.labels = torch.randint(*labels, (40,))
    Case(head, **transform).check(torch.randn(40), torch.randn(40) if entropy else None)


@pytest.mark.parametrize("how", [None, (0.1, 0.1)])
def test_a_scale_of_zero_has_no_gradient(monkeypatch, how):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    case = Case(small_head(N=40, V=700), routed=how, scale=0.0)
    _, _, ours, _ = case.run(torch.randn(40))
    assert not ours.hidden.any() and not ours.weight.any()


@pytest.mark.parametrize("crossover", [None, 0.0, 1.0])  # exact; a routed call's exact path, and its routed one
def test_a_row_that_is_no_number_and_has_no_gradient_changes_nothing(monkeypatch, crossover):
    """And one that has a gradient spoils its own row of dhidden alone."""
    monkeypatch.setattr(backward, "CROSSOVER", 1.0 if crossover is None else crossover)
    head, needs = small_head(N=40, V=700), Needs(True, True, False, False, False)
    coef = torch.randn(40)
    coef[7] = 0

    def gradients(bad: int | None, needs: Needs):
        case = Case(head, routed=None if crossover is None else (0.1, 0.1))
        if bad is not None:
            case.head.hidden[bad, 5] = torch.nan
        routing = case.routing(True, needs)
        saved = forward(case.head, case.rows, stats=frozenset(), routing=routing, shards=None)
        return backward.backward(case.head, case.rows, saved, Upstream(coef.to(DEVICE)), routing, needs)

    clean, bad = gradients(None, needs), gradients(7, needs)
    torch.testing.assert_close(bad.hidden, clean.hidden)
    assert not bad.hidden[7].any()
    if crossover != 0.0:  # a dense product over all tokens takes 0 * NaN
        torch.testing.assert_close(bad.weight, clean.weight)
    others = torch.arange(40) != 9
    spoilt, clean = (gradients(bad, Needs(True, False, False, False, False)) for bad in (9, None))
    torch.testing.assert_close(spoilt.hidden[others], clean.hidden[others])
    assert spoilt.hidden[9].isnan().all()
