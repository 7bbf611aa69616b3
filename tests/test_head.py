"""The options of a head: one list, from which every public signature follows; what a call may be given."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch

import fastdpo
from fastdpo.head import (
    DEFAULT_TAU,
    FROZEN_HEAD_TAU,
    HEAD_OPTIONS,
    HeadOptions,
    LogitTransform,
    Routing,
    check_head,
)
from fastdpo.linear_dpo import LinearDPOLoss

# Another value of each option, and one that is refused with the option's name.
VALUES = {
    "ignore_index": (-7, 1.5),
    "logit_scale": (0.5, float("nan")),
    "softcap": (3.0, 0.0),
    "temperature": (2.0, -1.0),
    "backward": ("exact", "fast"),
    "tau": ((0.01, 0.1), 1.5),
    "seed": (2**64 - 1, 2**64),
    "vocab_group": (None, "nccl"),
    "check_labels": (True, 1),
    "accumulate_into": ("grad", "main"),
}
N, V, H = 6, 300, 8


def test_the_list_is_whole():
    assert tuple(VALUES) == HEAD_OPTIONS


@pytest.mark.parametrize("function", [fastdpo.linear_logps, fastdpo.linear_token_stats])
def test_public_signatures_are_the_list(function):
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY]
    given = {p.name: p.default for p in keywords if p.name not in ("lora", "stats")}
    assert given.keys() == set(HEAD_OPTIONS)
    assert given == {name: getattr(HeadOptions(), name) for name in HEAD_OPTIONS}


@pytest.mark.parametrize("name", HEAD_OPTIONS)
def test_every_door_takes_every_option(name):
    value, wrong = VALUES[name]
    hidden, weight, labels = torch.randn(2, N, H), torch.randn(V, H), torch.zeros(2, N, dtype=torch.int64)
    doors = {
        "linear_logps": lambda **options: fastdpo.linear_logps(hidden, weight, labels, **options),
        "linear_token_stats": lambda **options: fastdpo.linear_token_stats(hidden, weight, labels, **options),
        "linear_dpo_loss": lambda **options: fastdpo.linear_dpo_loss(hidden, weight, labels, **options),
        "LinearDPOLoss": lambda **options: LinearDPOLoss(**options)(hidden, weight, labels),
    }
    for door, call in doors.items():
        call(**{name: value})
        with pytest.raises((TypeError, ValueError), match=name):
            call(**{name: wrong})
            pytest.fail(f"{door} took {name}={wrong!r}")


def test_a_seed_without_draws_is_refused():
    for option in ({"tau": 0.1}, {"seed": 3}):
        with pytest.raises(ValueError, match="belongs to backward='routed'"):
            HeadOptions(backward="exact", **option)


@pytest.mark.parametrize("of_hidden,of_weight", [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_sampled_for_the_gradients_that_are_wanted(of_hidden, of_weight):
    routing = HeadOptions(tau=(0.1, 0.01)).routing(of_hidden, of_weight)
    wanted = [tau for tau, flag in ((0.1, of_hidden), (0.01, of_weight)) if flag]
    assert routing.taus == tuple(sorted(wanted))
    for which, tau, flag in ((routing.hidden_set, 0.1, of_hidden), (routing.weight_set, 0.01, of_weight)):
        assert routing.taus[which] == tau if flag else which == -1
    assert HeadOptions(backward="exact").routing(of_hidden, of_weight).taus == ()
    default = HeadOptions().routing(of_hidden, of_weight).taus
    assert default == ((DEFAULT_TAU,) if of_weight else (FROZEN_HEAD_TAU,) if of_hidden else ())


def test_two_equal_taus_are_one_set():
    assert Routing.of(0.1, 0.1) == Routing((0.1,), 0, 0)
    assert Routing.of(0.0, 0.0).taus == (0.0,)


def test_a_checked_call_is_flat_and_keeps_its_shape():
    labels, lora = torch.zeros(2, 3, dtype=torch.int32), (torch.zeros(4, H), torch.zeros(V, 4), 0.5)
    call = check_head(torch.zeros(2, 3, H), torch.zeros(V, H), labels, None, lora, HeadOptions())
    hidden, weight, bias, lora_a, lora_b, flat = call.tensors
    assert hidden.shape == (2, 3, H) and weight.shape == (V, H) and bias is None and call.lora_scale == 0.5
    assert lora_a is lora[0] and lora_b is lora[1] and flat.shape == (6,) and call.shape == (2, 3)


def test_logits_of_products():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    assert LogitTransform().applied(x) is x
    expected = 3 * torch.tanh(0.5 * x / 3) / 2
    torch.testing.assert_close(LogitTransform(0.5, 3.0, 2.0).applied(x), expected, rtol=1e-12, atol=0)


def test_the_default_tau_is_documented():
    document = (Path(__file__).parents[1] / "docs" / "choose.md").read_text()
    for tau in (DEFAULT_TAU, FROZEN_HEAD_TAU):
        assert f"**routed, tau 2^{math.log2(tau):.0f}**" in document  # bold: a default
