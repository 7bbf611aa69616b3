"""What holds of every two heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import ENGINES, EPS, SEEDS, computed_by, problems
from torch import Tensor

import fastdpo

engines = pytest.mark.parametrize("engine", ENGINES[:2])
PLAIN = {"dtypes": (torch.float32,), "transforms": st.just({}), "least": 1}
KINDS = st.sampled_from(["forward_kl", "reverse_kl", "jsd"])


def two_heads(problem, seed: int) -> dict[str, Tensor]:
    chance, head = torch.Generator().manual_seed(seed), problem.head.leaves(torch.float32, False)
    n, vocab_size, size = len(head.hidden), len(head.weight), 5
    return {
        "hidden": head.hidden,
        "weight": head.weight,
        "ref_hidden": torch.randn(n, size, generator=chance),
        "ref_weight": torch.randn(vocab_size, size, generator=chance),
        "labels_or_mask": head.labels,
    }


def exchanged(heads: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    return {**heads, **{name: heads[other] for name, other in zip(names, names[2:] + names[:2])}}


def divergence(heads: dict[str, Tensor], **options) -> Tensor:
    return fastdpo.linear_divergence(**heads, **options).divergence


def tolerance(heads: dict[str, Tensor]) -> dict[str, float]:
    logits = max(heads[f"{of}hidden"].abs().max() * heads[f"{of}weight"].abs().sum(1).max() for of in ("", "ref_"))
    return {"rtol": 1e-4, "atol": 64 * EPS * (1 + logits.item())}


def logps(heads: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of student and teacher, in fp64."""
    pairs = (heads["hidden"], heads["weight"]), (heads["ref_hidden"], heads["ref_weight"])
    return tuple((hidden.double() @ weight.double().T).log_softmax(-1) for hidden, weight in pairs)


@engines
@given(problems(**PLAIN), KINDS, st.sampled_from([0.1, 0.5, 0.9]), SEEDS)
def test_the_definition(engine, problem, kind, beta, seed):
    heads = two_heads(problem, seed)
    p, r = logps(heads)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    m = torch.logaddexp(p + math.log(1 - beta), r + math.log(beta))
    expected = {"forward_kl": kl(r, p), "reverse_kl": kl(p, r), "jsd": beta * kl(r, m) + (1 - beta) * kl(p, m)}[kind]
    expected = expected.masked_fill(heads["labels_or_mask"] == -100, 0.0)
    options = {"jsd_beta": beta} if kind == "jsd" else {}
    with computed_by(engine):
        found = divergence(heads, kind=kind, **options)
    torch.testing.assert_close(found.double(), expected, **tolerance(heads))


@engines
@given(problems(**PLAIN), SEEDS)
def test_roles_exchanged(engine, problem, seed):
    heads = two_heads(problem, seed)
    with computed_by(engine):
        for kind, other in (("forward_kl", "reverse_kl"), ("jsd", "jsd")):
            one, two = divergence(heads, kind=kind), divergence(exchanged(heads), kind=other)
            torch.testing.assert_close(one, two, **tolerance(heads))


@engines
@given(problems(**PLAIN), KINDS)
def test_a_head_does_not_diverge_from_itself(engine, problem, kind):
    head = problem.head.leaves(torch.float32)
    arguments = (head.hidden, head.weight, head.hidden.detach(), head.weight.detach(), head.labels)
    with computed_by(engine):
        found = fastdpo.linear_divergence(*arguments, kind=kind, backward="exact").divergence
        grads = torch.autograd.grad(found.sum(), (head.hidden, head.weight))
    of_logits = problem.bounds()[0]
    assert (found.abs() <= 4 * of_logits).all()
    assert all(grad.abs().max() <= 64 * of_logits * (1 + problem.head.weight.abs().max() * len(grad)) for grad in grads)


@engines
@given(problems(**PLAIN), KINDS, SEEDS)
def test_permutations_of_tokens_and_of_the_vocabulary(engine, problem, kind, seed):
    heads, chance = two_heads(problem, seed), torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(len(heads[name]), generator=chance) for name in ("hidden", "weight"))
    mask = heads["labels_or_mask"] != -100
    heads["labels_or_mask"] = mask
    of_rows = {name: heads[name][rows] for name in ("hidden", "ref_hidden", "labels_or_mask")}
    of_columns = {name: heads[name][columns] for name in ("weight", "ref_weight")}
    with computed_by(engine):
        whole = divergence(heads, kind=kind)
        assert (whole >= -tolerance(heads)["atol"]).all() and not whole[~mask].any()
        torch.testing.assert_close(divergence({**heads, **of_rows}, kind=kind), whole[rows], **tolerance(heads))
        torch.testing.assert_close(divergence({**heads, **of_columns}, kind=kind), whole, **tolerance(heads))


@engines
@given(problems(**PLAIN), KINDS, SEEDS)
def test_all_ids_of_a_teacher_are_its_head(engine, problem, kind, seed):
    """topk_divergence with K = V."""
    heads = two_heads(problem, seed)
    vocab_size, labels = len(heads["weight"]), heads["labels_or_mask"]
    ids = torch.arange(vocab_size).expand(len(labels), -1)
    ids = torch.where(labels[:, None] == -100, -100, ids)
    with computed_by(engine):
        found = fastdpo.topk_divergence(
            heads["hidden"], heads["weight"], ids, logps(heads)[1].float(), kind=kind, tail="renormalize"
        )
        expected = divergence(heads, kind=kind)
    torch.testing.assert_close(found, expected, **tolerance(heads))
