"""What holds of every token-level problem."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import (
    ENGINES,
    EPS,
    EVERY_PAIR,
    EXACT,
    SEEDS,
    Problem,
    assert_close,
    assert_times,
    computed_by,
    problems,
)

import fastdpo

engines = pytest.mark.parametrize("engine", ENGINES)
NO_CAP = st.fixed_dictionaries({}, optional={"logit_scale": st.sampled_from([0.5, 1.7])})
SCALABLE = (torch.float32, torch.bfloat16)  # whose exponents have room for powers of two
SAMPLED = {"backward": "routed", "tau": 0.1, "seed": 3}


def permutation(problem: Problem, size: int) -> torch.Tensor:
    return torch.randperm(size, generator=problem.generator())


@engines
@given(problems())
def test_the_definition(engine, problem):
    with computed_by(engine):
        assert_close(problem, problem.run(), problem.definition())


@engines
@given(problems())
def test_a_permutation_of_tokens(engine, problem):
    order = permutation(problem, len(problem.coef))
    with computed_by(engine):
        (logps, grads), ours = problem.run(), problem.rows(order).run()
    grads = {**grads, "hidden": grads["hidden"][order]}
    assert_close(problem.rows(order), ours, (logps[order], grads), 2)


@given(problems(backwards=(EXACT,)), st.integers(1, 200))
def test_some_tokens_in_any_order_bit_for_bit(problem, size):
    order = permutation(problem, len(problem.coef))[:size]
    with computed_by("cpu", deterministic=True):
        (logps, grads), (ours, our_grads) = problem.run(), problem.rows(order).run()
    assert torch.equal(ours, logps[order]) and torch.equal(our_grads["hidden"], grads["hidden"][order])


@engines
@given(problems(), st.data())
def test_parts_of_a_batch(engine, problem, data):
    n = len(problem.coef)
    cut = data.draw(st.integers(0, n))
    parts = [problem.rows(torch.arange(0, cut)), problem.rows(torch.arange(cut, n))]
    with computed_by(engine):
        whole, results = problem.run(), [part.run() for part in parts]
    grads = {name: sum(grads[name].double() for _, grads in results) for name in whole[1] if name != "hidden"}
    grads["hidden"] = torch.cat([grads["hidden"] for _, grads in results])
    assert_close(problem, whole, (torch.cat([logps for logps, _ in results]), grads), 3)


@engines
@given(problems(transforms=NO_CAP, dtypes=(torch.float32,)), st.sampled_from([-3.0, 2.0, 40.0]))
def test_a_constant_on_all_logits(engine, problem, constant):
    bias = torch.zeros(len(problem.head.weight)).double() if problem.head.bias is None else problem.head.bias
    before, after = problem.but(bias=bias), problem.but(bias=(bias + constant).float().double())
    with computed_by(engine):
        assert_close(after, after.run(), before.run(), 4)


@engines
@given(problems())
def test_a_permutation_of_the_vocabulary(engine, problem):
    head = problem.head
    order = permutation(problem, len(head.weight))
    labels = torch.where(head.labels == -100, head.labels, order.argsort()[head.labels.clamp(min=0)])
    bias = None if head.bias is None else head.bias[order]
    lora = None if head.lora is None else (head.lora[0], head.lora[1][order], head.lora[2])
    moved = problem.but(weight=head.weight[order], labels=labels, bias=bias, lora=lora)
    with computed_by(engine):
        (logps, grads), ours = problem.run(), moved.run()
    assert_close(
        moved, ours, (logps, {k: v[order] if k in ("weight", "bias", "lora_b") else v for k, v in grads.items()}), 2
    )


@engines
@given(problems(transforms=NO_CAP), st.integers(1, 200), st.sampled_from([-math.inf, -1e30]))
def test_columns_ruled_out(engine, problem, more, low):
    assume(problem.dtype != torch.float16 or low == -math.inf)
    head, v = problem.head, len(problem.head.weight)
    low = torch.tensor(low, dtype=problem.dtype).double()
    bias = torch.zeros(v).double() if head.bias is None else head.bias
    lora = head.lora and (head.lora[0], torch.cat((head.lora[1], head.lora[1].new_ones(more, 3))), head.lora[2])
    narrow = problem.but(bias=bias)
    wide = problem.but(
        weight=torch.cat((head.weight, head.weight.new_ones(more, head.weight.shape[1]))),
        bias=torch.cat((bias, low.expand(more))),
        lora=lora,
    )
    with computed_by(engine):
        logps, grads = wide.run()
        expected = narrow.run()
    for name in ("weight", "bias", "lora_b"):
        if name in grads:
            assert not grads[name][v:].any(), name
            grads[name] = grads[name][:v]
    assert_close(narrow, (logps, grads), expected, 2)


@engines
@given(problems(dtypes=SCALABLE, backwards=(EXACT, EVERY_PAIR, SAMPLED)), st.integers(-6, 6))
def test_upstream_gradients_times_a_power_of_two(engine, problem, exponent):
    factor = 2.0**exponent
    with computed_by(engine):
        logps, grads = problem.run()
        ours = problem.but(coef=problem.coef * factor).run()
    for name, grad in grads.items():
        assert_times(ours[1][name], grad, factor)
    assert torch.equal(ours[0], logps)


@engines
@given(problems(dtypes=SCALABLE, transforms=st.just({}), backwards=(EXACT,)), st.integers(-6, 6))
def test_powers_of_two_between_hidden_and_weight(engine, problem, exponent):
    factor, head = 2.0**exponent, problem.head
    assume(head.lora is None)
    moved = problem.but(hidden=head.hidden * factor, weight=head.weight / factor)
    with computed_by(engine):
        logps, grads = problem.run()
        ours = moved.run()
    factors = {"hidden": 1 / factor, "weight": factor, "bias": 1.0}
    assert torch.equal(ours[0], logps)
    for name, grad in grads.items():
        assert_times(ours[1][name], grad, factors[name])


@engines
@given(problems(backwards=(EXACT, EVERY_PAIR)))
def test_rows_left_out_are_never_read(engine, problem):
    head, ignored = problem.head, problem.head.labels == -100
    kept = (~ignored).nonzero()[:, 0]
    spoiled = problem.but(
        hidden=torch.where(ignored[:, None], torch.nan, head.hidden),
        coef=torch.where(ignored, torch.inf, problem.coef),
    )
    with computed_by(engine):
        (logps, grads), expected = spoiled.run(), problem.rows(kept).run()
    assert not logps[ignored].any() and not grads["hidden"][ignored].any()
    grads["hidden"] = grads["hidden"][kept]
    assert_close(problem.rows(kept), (logps[kept], grads), expected, 2)


@engines
@given(problems(least=1, masks=False), st.sampled_from([math.nan, math.inf]), st.data())
def test_a_bad_row_stays_alone(engine, problem, value, data):
    row = data.draw(st.integers(0, len(problem.coef) - 1))
    hidden = problem.head.hidden.clone()
    hidden[row, 0] = value
    others = torch.arange(len(hidden)) != row
    with computed_by(engine):
        logps, grads = problem.but(hidden=hidden).run()
        expected = problem.run()
    of_logps = problem.bounds()[0]
    torch.testing.assert_close(logps[others], expected[0][others], rtol=0, atol=4 * of_logps)
    assert grads["hidden"][others].isfinite().all()
    if value != value:
        assert logps[row].isnan()


@engines
@given(problems(least=1, masks=False), st.data())
def test_an_out_of_range_label_is_nan_in_its_row(engine, problem, data):
    row, v = data.draw(st.integers(0, len(problem.coef) - 1)), len(problem.head.weight)
    labels = problem.head.labels.clone()
    labels[row] = data.draw(st.sampled_from([v, v + 1, -1, -99, 2**31 - 1, -(2**31)]))
    others = (torch.arange(len(labels)) != row).nonzero()[:, 0]
    with computed_by(engine):
        logps, grads = problem.but(labels=labels).run()
        expected = problem.rows(others).run()
    assert logps[row].isnan() and grads["hidden"][row].isnan().all()
    grads["hidden"] = grads["hidden"][others]
    assert_close(problem.rows(others), (logps[others], grads), expected, 2)


@engines
@given(problems(dtypes=(torch.float32,)))
def test_a_low_rank_head_is_the_merged_one(engine, problem):
    assume(problem.head.lora is not None)
    a, b, s = problem.head.lora
    merged = problem.but(weight=(problem.head.weight + s * b @ a).float().double(), lora=None)
    with computed_by(engine):
        (logps, grads), expected = problem.run(), merged.run()
    names = [name for name in grads if not name.startswith("lora")]
    assert_close(problem, (logps, {name: grads[name] for name in names}), expected, 4)


@engines
@given(problems(dtypes=(torch.float32,)), st.sampled_from([0.5, 1.7]), st.sampled_from([0.6, 2.0]))
def test_a_temperature_divides_the_scale(engine, problem, scale, temperature):
    one = problem.but(transform={"logit_scale": scale, "temperature": temperature})
    other = problem.but(transform={"logit_scale": scale / temperature})
    with computed_by(engine):
        assert_close(one, one.run(), other.run(), 2)


@engines
@given(problems(least=1, masks=False, dtypes=(torch.float32,)), st.sampled_from([1e3, 1e6, 1e12]))
def test_large_logits(engine, problem, size):
    """Logits apart by more than exp can tell: the label's probability is 1 or its log-prob a difference of logits."""
    problem = problem.but(hidden=(problem.head.hidden * size).float().double())
    with computed_by(engine):
        logps, grads = problem.run()
    expected, _ = problem.definition()
    assert logps.isfinite().all() and (logps <= 0).all()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert ((logps.double() - expected).abs() <= 2 * problem.bounds()[0]).all()


@engines
@given(problems(least=1, backwards=(EXACT,)), st.integers(1, 4), SEEDS)
def test_several_labels_of_a_row(engine, problem, k, seed):
    v = len(problem.head.weight)
    labels = torch.randint(v, (len(problem.coef), k), generator=torch.Generator().manual_seed(seed))
    with computed_by(engine):
        several, grads = problem.but(labels=labels, coef=problem.coef[:, None].expand(-1, k) / k).run()
        each = [problem.but(labels=labels[:, j], coef=problem.coef / k) for j in range(k)]
        results = [one.run() for one in each]
    summed = {name: sum(grads[name].double() for _, grads in results) for name in grads}
    of_logps = max(one.bounds()[0] for one in each)
    for j in range(k):
        torch.testing.assert_close(several[:, j], results[j][0], rtol=0, atol=4 * of_logps)
    for name, grad in grads.items():
        bound = 3 * sum(one.bounds()[1][name] for one in each)
        assert (grad.double() - summed[name]).norm() <= bound, name


@engines
@given(problems(least=1))
def test_statistics(engine, problem):
    head = problem.head.leaves(problem.dtype, False)
    arguments = (head.hidden, head.weight, head.labels, head.bias)
    with computed_by(engine):
        stats = fastdpo.linear_token_stats(*arguments, lora=head.lora, **problem.transform)
        alone = fastdpo.linear_logps(*arguments, lora=head.lora, **problem.transform)
    z = problem.head.logits(**problem.transform)
    logp, counts = z.log_softmax(-1), problem.head.labels != -100
    of_logits = 4 * problem.bounds()[0]
    expected = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "lse": z.logsumexp(-1),
    }
    torch.testing.assert_close(stats.logps, alone, rtol=0, atol=of_logits)
    for name, value in expected.items():
        off = (getattr(stats, name).double() - value.where(counts, 0.0)).abs()
        allowed = of_logits * (1 + math.log(len(problem.head.weight)) + z.abs().amax(-1))
        assert (off <= allowed).all(), (name, off.max())
    assert (stats.entropy >= -16 * EPS * (1 + z.abs().amax(-1))).all()
    top = (problem.head.labels == z.argmax(-1)) & counts
    others = z.scatter(1, problem.head.labels.clamp(min=0)[:, None], -math.inf).amax(-1)
    own = z.gather(1, problem.head.labels.clamp(min=0)[:, None])[:, 0]
    clear = (own - others).abs() > 4 * of_logits
    assert torch.equal(stats.is_top1[clear], top[clear])
