"""What holds of every batch of preference pairs."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import ENGINES, SEEDS, assert_times, computed_by, problems
from torch import Tensor

import fastdpo
from fastdpo.losses import LOSSES

engines = pytest.mark.parametrize("engine", ENGINES[:2])
NAMES = sorted(LOSSES)
RANKED = {name for name, loss in LOSSES.items() if loss.ranked}
OF_A_BATCH = RANKED | {"sft"}  # a row's loss is not its pair's alone
SCORES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
KLS = ("chosen_kl", "rejected_kl")
# Of beta times scores alone, and of scores minus a target of 1 / beta, squared.
OF_BETA = ("sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down", "cpo", "kto")
SQUARED = ("ipo", "sppo_hard")
# Of a policy's score minus the reference's; aot sorts both before it takes them from each other.
OF_DIFFERENCES = [name for name in NAMES if not LOSSES[name].reference_free and name not in ("sft", "aot")]


def batch(name: str, size: int, seed: int, dtype=torch.float64) -> dict[str, Tensor]:
    """What the loss reads, of `dtype`."""
    loss, chance = LOSSES[name], torch.Generator().manual_seed(seed)

    def uniform(scale: float) -> Tensor:
        return (-scale * torch.rand(size, generator=chance, dtype=torch.float64)).to(dtype)

    given = {name: uniform(30.0) for name in SCORES[: 2 if loss.reference_free or name == "sft" else 4]}
    given.update({name: torch.randint(1, 40, (size,), generator=chance) for name in loss.lengths})
    if loss.kl:
        given.update({name: -uniform(3.0) for name in KLS})
    return given


def random(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(a permutation, normal numbers)"""
    chance = torch.Generator().manual_seed(seed + 1)
    return torch.randperm(size, generator=chance), torch.randn(size, generator=chance)


def with_gradients(given: dict[str, Tensor], upstream: Tensor | None = None, **options):
    """(output, gradients of the loss, or of the losses under `upstream`)"""
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in given.items()}
    found = fastdpo.preference_loss(**leaves, **options)
    differentiable = [v for v in leaves.values() if v.requires_grad]
    of = (found.loss, None) if upstream is None else (found.losses, upstream)
    grads = torch.autograd.grad(of[0], differentiable, of[1], allow_unused=True)
    return found, dict(zip((k for k, v in leaves.items() if v.requires_grad), grads))


def options_of(name: str) -> dict:
    return {"loss_type": name, **({"label_smoothing": 0.1} if LOSSES[name].label_smoothing else {})}


@engines
@given(st.sampled_from(NAMES), st.integers(0, 40), SEEDS)
def test_the_same_in_fp64(engine, name, size, seed):
    given = batch(name, size, seed, torch.float32)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    with computed_by(engine):
        found, grads = with_gradients(given, **options_of(name))
        expected, expected_grads = with_gradients(wide, **options_of(name))
    for ours, value in zip(found, expected):
        torch.testing.assert_close(ours.double(), value, rtol=2e-5, atol=2e-5)
    for key, grad in grads.items():
        assert (grad is None) == (expected_grads[key] is None)
        if grad is not None:
            torch.testing.assert_close(grad.double(), expected_grads[key], rtol=1e-4, atol=1e-6)


@engines
@given(st.sampled_from([x for x in NAMES if x not in OF_A_BATCH]), st.integers(1, 200), SEEDS)
def test_a_permutation_of_pairs(engine, name, size, seed):
    given, order, coef = batch(name, size, seed, torch.float32), *random(size, seed)
    with computed_by(engine):
        found, grads = with_gradients(given, coef, **options_of(name))
        moved, moved_grads = with_gradients({k: v[order] for k, v in given.items()}, coef[order], **options_of(name))
    for field in ("losses", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(getattr(moved, field), getattr(found, field)[order], rtol=1e-6, atol=1e-6)
    for key, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(moved_grads[key], grad[order], rtol=1e-5, atol=1e-7)


@engines
@given(st.sampled_from(sorted(OF_A_BATCH)), st.integers(1, 50), SEEDS)
def test_the_mean_does_not_see_the_order(engine, name, size, seed):
    given, (order, _) = batch(name, size, seed), random(size, seed)
    with computed_by(engine):
        found, _ = with_gradients(given, **options_of(name))
        moved, _ = with_gradients({k: v[order] for k, v in given.items()}, **options_of(name))
    torch.testing.assert_close(moved.loss, found.loss, rtol=1e-12, atol=1e-12)


@engines
@given(st.sampled_from([x for x in NAMES if x not in OF_A_BATCH]), st.integers(0, 30), st.integers(1, 30), SEEDS)
def test_parts_of_a_batch(engine, name, cut, rest, seed):
    given = batch(name, cut + rest, seed)
    with computed_by(engine):
        whole, grads = with_gradients(given, torch.ones(cut + rest).double(), **options_of(name))
        parts = [{k: v[part] for k, v in given.items()} for part in (slice(cut), slice(cut, None))]
        results = [with_gradients(part, torch.ones_like(part["chosen_logps"]), **options_of(name)) for part in parts]
    torch.testing.assert_close(torch.cat([x.losses for x, _ in results]), whole.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.losses.mean(), whole.loss, rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(torch.cat([x[key] for _, x in results]), grad, rtol=1e-12, atol=1e-14)


@engines
@given(st.sampled_from(NAMES), st.integers(1, 30), st.integers(-8, 8), SEEDS)
def test_upstream_gradients_times_a_power_of_two(engine, name, size, exponent, seed):
    given, (_, coef) = batch(name, size, seed, torch.float32), random(size, seed)
    with computed_by(engine):
        _, grads = with_gradients(given, coef, **options_of(name))
        _, scaled = with_gradients(given, coef * 2.0**exponent, **options_of(name))
    for key, grad in grads.items():
        if grad is not None:
            assert_times(scaled[key], grad, 2.0**exponent)


@engines
@given(st.sampled_from(OF_DIFFERENCES), st.integers(1, 30), SEEDS)
def test_what_policy_and_reference_share_cancels(engine, name, size, seed):
    given, (order, shift) = batch(name, size, seed), random(size, seed)
    shifts = shift.double(), shift[order].double()
    moved = {**given, **{k: given[k] + shifts[i % 2] for i, k in enumerate(SCORES)}}
    with computed_by(engine):
        found, grads = with_gradients(given, **options_of(name))
        ours, our_grads = with_gradients(moved, **options_of(name))
    torch.testing.assert_close(ours.losses, found.losses, rtol=1e-9, atol=1e-9)
    for key, grad in grads.items():
        if grad is not None:
            torch.testing.assert_close(our_grads[key], grad, rtol=1e-8, atol=1e-10)


@engines
@given(st.sampled_from(OF_BETA + SQUARED), st.integers(1, 30), st.integers(-3, 3), SEEDS)
def test_beta_against_scores(engine, name, size, exponent, seed):
    """Powers of two, so that every bit is the same."""
    given, factor = batch(name, size, seed, torch.float32), 2.0**exponent
    scaled = {k: v / factor if v.is_floating_point() else v for k, v in given.items()}
    with computed_by(engine):
        found = fastdpo.preference_loss(**given, beta=0.125, **options_of(name))
        ours = fastdpo.preference_loss(**scaled, beta=0.125 * factor, **options_of(name))
    expected = found.losses / factor**2 if name in SQUARED else found.losses
    assert torch.equal(ours.losses, expected)
    assert torch.equal(ours.chosen_rewards, found.chosen_rewards)


@engines
@given(st.integers(1, 30), st.sampled_from([0.0, 0.1, 0.5]), SEEDS)
def test_chosen_and_rejected_exchanged(engine, size, smoothing, seed):
    given = batch("ipo", size, seed)
    beta, lengths = 0.25, ("chosen_lengths", "rejected_lengths")
    exchanged = {
        **dict(zip(SCORES, (given[k] for k in (SCORES[1], SCORES[0], SCORES[3], SCORES[2])))),
        **dict(zip(lengths, (given[k] for k in reversed(lengths)))),
    }
    scores = [given[SCORES[i]] - given[SCORES[i + 2]] for i in range(2)]
    d = scores[0] - scores[1]
    per_token = scores[0] / given[lengths[0]] - scores[1] / given[lengths[1]]
    smoothed = {"label_smoothing": smoothing}

    def both(name: str, **options) -> tuple[Tensor, Tensor]:
        results = []
        for x in (given, exchanged):
            x = {k: v for k, v in x.items() if k in SCORES or LOSSES[name].lengths}
            results.append(fastdpo.preference_loss(**x, beta=beta, loss_type=name, **options).losses)
        return results[0], results[1]

    with computed_by(engine):
        for name, options, difference in (
            ("sigmoid", smoothed, -beta * d * (1 - 2 * smoothing)),
            ("sigmoid_norm", {}, -beta * per_token),
            ("ipo", {}, -2 * per_token / beta),
        ):
            one, other = both(name, **options)
            torch.testing.assert_close(one - other, difference, rtol=1e-9, atol=1e-9)
        for name, total in (("apo_zero", 2.0), ("kto", 1.0)):
            one, other = both(name)
            torch.testing.assert_close(one + other, torch.full_like(one, total), rtol=1e-12, atol=1e-12)


@engines
@given(
    st.lists(st.sampled_from(["sigmoid", "hinge", "apo_down", "bco_pair", "aot", "sft"]), min_size=1, max_size=4), SEEDS
)
def test_a_weighted_sum_of_losses(engine, names, seed):
    names = list(dict.fromkeys(names))
    assume(names != ["sft"])
    given = {**batch("sigmoid", 9, seed), **batch("sft", 9, seed)}
    weights = [0.5 + i for i in range(len(names))]

    def reads(several: list[str]) -> dict[str, Tensor]:
        return {k: v for k, v in given.items() if k in SCORES or "sft" in several}

    with computed_by(engine):
        found = fastdpo.preference_loss(**reads(names), loss_type=names, loss_weights=weights)
        single = [fastdpo.preference_loss(**reads([name]), loss_type=name).loss for name in names]
    expected = sum(weight * loss for weight, loss in zip(weights, single))
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)


OF_DPO = [name for name in NAMES if not LOSSES[name].kl and name != "exo_pair"]


@engines
@given(problems(dtypes=(torch.float32,)), st.sampled_from(OF_DPO), st.integers(1, 4), st.booleans())
def test_the_loss_of_a_head_is_that_of_its_log_probs(engine, problem, name, pairs, packed):
    n = len(problem.coef) // (2 * pairs)
    assume(n > 0)
    problem = problem.rows(torch.arange(2 * pairs * n))
    head, shape = problem.head.leaves(torch.float32), (2 * pairs, n)
    hidden, labels = head.hidden, head.labels
    layout = {"cu_seqlens": torch.arange(2 * pairs + 1) * n} if packed else {}
    if not packed:
        hidden, labels = hidden.view(*shape, -1), labels.view(shape)
    reference = torch.randn(2 * pairs, generator=problem.generator())
    reads_reference = not LOSSES[name].reference_free
    options = {**problem.transform, **problem.backward}
    with computed_by(engine, deterministic=True):
        ours = fastdpo.linear_dpo_loss(
            hidden, head.weight, labels, bias=head.bias, lora=head.lora, loss_type=name, **layout, **options,
            ref_logps=reference if reads_reference else None,
        )  # fmt: skip
        grads = torch.autograd.grad(ours.loss, list(head.tensors().values()), allow_unused=True)
        logps = fastdpo.linear_logps(hidden, head.weight, labels, head.bias, lora=head.lora, **options).view(shape)
        sums, lengths = logps.double().sum(1).float(), (head.labels.view(shape) != -100).sum(1)
        given = {"chosen_logps": sums[:pairs], "rejected_logps": sums[pairs:]}
        if reads_reference:
            given.update(ref_chosen_logps=reference[:pairs], ref_rejected_logps=reference[pairs:])
        of_lengths = {"chosen_lengths": lengths[:pairs], "rejected_lengths": lengths[pairs:]}
        given.update({k: v for k, v in of_lengths.items() if k in LOSSES[name].lengths})
        expected = fastdpo.preference_loss(**given, loss_type=name)
        expected_grads = torch.autograd.grad(expected.loss, list(head.tensors().values()), allow_unused=True)
    torch.testing.assert_close(ours.losses, expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat((ours.chosen_logps, ours.rejected_logps)), sums, rtol=1e-6, atol=1e-6)
    for one, other in zip(grads, expected_grads):
        assert relative_error(one, other) < 1e-4 or (one - other).norm() < 1e-6 * problem.coef.numel()
