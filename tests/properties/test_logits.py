"""What holds of log-probs that are read from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import DTYPES, ENGINES, EPS, SEEDS, assert_times, computed_by
from torch import Tensor

import fastdpo

engines = pytest.mark.parametrize("engine", ENGINES[:2])


@dataclass(frozen=True)
class Logits:
    logits: Tensor
    index: Tensor
    coef: Tensor
    temperature: float

    def __repr__(self) -> str:
        return f"Logits({list(self.logits.shape)}, {self.logits.dtype}, temperature={self.temperature})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(repr(self))

    def run(self, logits=None, index=None, coef=None):
        """(logps, dlogits)"""
        logits = (self.logits if logits is None else logits).detach().requires_grad_()
        index, coef = self.index if index is None else index, self.coef if coef is None else coef
        logps = fastdpo.selective_log_softmax(logits, index, temperature=self.temperature)
        (grad,) = torch.autograd.grad(logps, logits, coef.to(logps.dtype))
        return logps.detach(), grad

    def assert_close(self, ours, expected) -> None:
        size = 1 + (self.logits.double().abs() / self.temperature).where(self.logits.isfinite(), 0).max().item()
        torch.testing.assert_close(ours[0].double(), expected[0].double(), rtol=0, atol=16 * EPS * size)
        eps = torch.finfo(self.logits.dtype).eps + 32 * EPS * size
        tiny = torch.finfo(self.logits.dtype).smallest_normal
        torch.testing.assert_close(ours[1].double(), expected[1].double(), rtol=eps, atol=tiny + 32 * EPS * size)


@st.composite
def logits_of(draw, dtypes=DTYPES) -> Logits:
    n, v = draw(st.integers(1, 40)), draw(st.integers(1, 9) | st.sampled_from([127, 128, 129, 1003]))
    dtype, scale, seed = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0.0, 1.0, 20.0])), draw(SEEDS)
    chance = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, v, generator=chance)).to(dtype)
    index = torch.randint(v, (n,), generator=chance)
    index[torch.rand(n, generator=chance) < 0.2] = -100
    return Logits(logits, index, torch.randn(n, generator=chance), draw(st.sampled_from([1.0, 0.6, 2.0])))


@engines
@given(logits_of())
def test_the_definition(engine, x):
    wide = x.logits.double().requires_grad_()
    logps = (wide / x.temperature).log_softmax(-1).gather(-1, x.index.clamp(min=0)[:, None])[:, 0]
    logps = logps.masked_fill(x.index == -100, 0.0)
    expected = logps.detach(), torch.autograd.grad(logps, wide, x.coef.double())[0]
    with computed_by(engine):
        x.assert_close(x.run(), expected)


@engines
@given(logits_of(), SEEDS)
def test_permutations(engine, x, seed):
    chance = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=chance) for size in x.logits.shape)
    with computed_by(engine):
        logps, grad = x.run()
        moved = x.run(x.logits[rows], x.index[rows], x.coef[rows])
        if engine == "cpu":
            assert torch.equal(moved[0], logps[rows]) and torch.equal(moved[1], grad[rows])
        x.assert_close(moved, (logps[rows], grad[rows]))
        index = torch.where(x.index == -100, x.index, columns.argsort()[x.index.clamp(min=0)])
        x.assert_close(x.run(x.logits[:, columns], index), (logps, grad[:, columns]))


@engines
@given(logits_of((torch.float32,)), st.sampled_from([-8.0, 0.5, 64.0]), st.integers(-8, 8))
def test_a_constant_on_all_logits_and_a_power_of_two_on_gradients(engine, x, constant, exponent):
    with computed_by(engine):
        logps, grad = x.run()
        moved = Logits(x.logits + constant, x.index, x.coef, x.temperature)
        moved.assert_close(moved.run(), (logps, grad))
        scaled = x.run(coef=x.coef * 2.0**exponent)[1]
    assert_times(scaled, grad, 2.0**exponent)


@engines
@given(logits_of(), st.integers(1, 150))
def test_columns_ruled_out(engine, x, more):
    wide = torch.nn.functional.pad(x.logits, (0, more), value=-math.inf)
    with computed_by(engine):
        logps, grad = x.run(wide)
        x.assert_close((logps, grad[:, :-more]), x.run())
    assert not grad[:, -more:].any()


@engines
@given(logits_of())
def test_layouts_and_types(engine, x):
    apart = torch.stack((x.logits, x.logits + 1), -1)[..., 0]
    turned = x.logits.T.contiguous().T
    offset = torch.cat((x.logits.new_ones(1), x.logits.reshape(-1)))[1:].view(x.logits.shape)
    with computed_by(engine):
        expected = x.run()
        for logits in (apart, turned, offset):
            x.assert_close(x.run(logits), expected)
        assert torch.equal(x.run(index=x.index.int())[0], expected[0])
        several = x.run(index=x.index[:, None].expand(-1, 3), coef=x.coef[:, None].expand(-1, 3) / 3)
    x.assert_close((several[0][:, 1], several[1]), expected)
