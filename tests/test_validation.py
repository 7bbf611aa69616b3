"""The public door: every numeric option takes Python's numbers and numpy's alike and refuses what is none; errors say
what was wrong with the argument they name."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastdpo
from fastdpo.head import HeadOptions
from fastdpo.losses import PREFERENCE_OPTIONS, PreferenceOptions
from fastdpo.models.huggingface import _Settings
from fastdpo.models.options import TRAINER_OPTIONS, head_options

B, T, H, V = 2, 3, 8, 200
G = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2 * B, T, H, generator=G)
WEIGHT = torch.randn(V, H, generator=G)
LABELS = torch.randint(0, V, (2 * B, T), generator=G)
LOGPS = -torch.rand(4, 5, generator=G) - 0.1
LENGTHS = {"chosen_lengths": torch.arange(1, 6), "rejected_lengths": torch.arange(2, 7)}

# Option: (a value that is exact in every type, what else the call needs)
HEAD = {
    "ignore_index": (7, {}),
    "logit_scale": (2, {}),
    "softcap": (3, {}),
    "temperature": (2, {}),
    "tau": (1, {"seed": 1}),
    "seed": (3, {}),
}
LOSS = {
    "beta": (2, {}),
    "label_smoothing": (0, {}),
    "f_alpha_divergence_coef": (2, {"f_divergence_type": "alpha_divergence"}),
    "discopop_tau": (2, {"loss_type": "discopop"}),
    "simpo_gamma": (2, {"loss_type": "simpo"}),
    "dpop_lambda": (2, {"loss_type": "dpop"}),
    "slic_delta": (2, {"loss_type": "slic"}),
    "kto_kl": (2, {"loss_type": "kto"}),
    "desirable_weight": (2, {"loss_type": "kto"}),
    "undesirable_weight": (2, {"loss_type": "kto"}),
    "tdpo_alpha": (2, {"loss_type": "tdpo2"}),
}
DPO = HEAD | LOSS | {"ld_alpha": (1, {})}


def first(result):
    return (result.loss if hasattr(result, "loss") else result.logps if hasattr(result, "logps") else result).double()


def kls(options):
    return dict(zip(("chosen_kl", "rejected_kl"), -LOGPS[2:])) if options.get("loss_type") == "tdpo2" else {}


def reference(options):
    return {"ref_hidden": HIDDEN.flip(0)} if options.get("loss_type") == "tdpo2" else {}


FUNCTIONS = {
    "linear_logps": (lambda **o: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, **o), HEAD),
    "linear_token_stats": (lambda **o: fastdpo.linear_token_stats(HIDDEN, WEIGHT, LABELS, **o), HEAD),
    "lora": (
        lambda scale: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, lora=(WEIGHT[:2], WEIGHT[:, :2], scale)),
        {"scale": (2, {})},
    ),
    "linear_dpo_loss": (lambda **o: fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, **reference(o), **o), DPO),
    "LinearDPOLoss": (lambda **o: fastdpo.LinearDPOLoss(**o)(HIDDEN, WEIGHT, LABELS, **reference(o)), DPO),
    "preference_loss": (lambda **o: fastdpo.preference_loss(*LOGPS[:2], **LENGTHS, **kls(o), **o), LOSS),
    "loss_weights": (
        lambda weight: fastdpo.preference_loss(*LOGPS[:2], loss_type=["sigmoid", "hinge"], loss_weights=[weight, 1]),
        {"weight": (2, {})},
    ),
    "tau of two": (
        lambda tau: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, tau=(1, tau), seed=1),
        {"tau": (1, {})},
    ),
    "selective_log_softmax": (
        lambda **o: fastdpo.selective_log_softmax(HIDDEN, LABELS % H, **o),
        {"temperature": (2, {})},
    ),
    "patch_model": (lambda **o: _Settings.of(o), {"tau": (1, {}), "seed": (3, {}), "ignore_index": (7, {})}),
    "patch_trl": (lambda **o: head_options("patch_trl", o, TRAINER_OPTIONS), {"tau": (1, {}), "seed": (3, {})}),
}
INTEGERS = ("ignore_index", "seed")
CASES = [(name, option) for name, (_, options) in FUNCTIONS.items() for option in options]

INTEGER_KINDS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64)
KINDS = (float, Fraction, np.float16, np.float32, np.float64, np.longdouble, *INTEGER_KINDS)


def call(name, option, value):
    function, options = FUNCTIONS[name]
    result = function(**options[option][1], **{option: value})
    return result if result is None or isinstance(result, (HeadOptions, _Settings)) else first(result)


@pytest.mark.parametrize("name,option", CASES)
def test_numbers_of_every_kind(name, option):
    value = FUNCTIONS[name][1][option][0]
    expected = call(name, option, value)
    for kind in INTEGER_KINDS if option in INTEGERS else KINDS:
        result = call(name, option, kind(value))
        if isinstance(result, torch.Tensor):
            assert torch.equal(result, expected), kind
        else:
            assert result == expected, kind


NO_NUMBERS = (True, False, np.True_, "2", 2j, Decimal(2), [2], np.ones(1), torch.tensor(2.0), torch.tensor(2))


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name,option", CASES)
def test_what_is_no_number_is_refused(name, option, value):
    if option == "kto_kl" and isinstance(value, torch.Tensor):
        pytest.skip("may be a tensor")
    error, says = (TypeError, "scale" if name == "lora" else "loss_weights" if name == "loss_weights" else option)
    if option == "tau" and isinstance(value, list):
        error = ValueError  # one number where there must be two
        if name == "tau of two":
            error = TypeError
    with pytest.raises(error, match=f"{says}.* must be ") as raised:
        call(name, option, value)
    if isinstance(value, torch.Tensor):
        assert "pass its item()" in str(raised.value)


@pytest.mark.parametrize("name,option", [case for case in CASES if case[1] in INTEGERS])
def test_integers_are_no_floats_and_fit(name, option):
    for value in (3.0, np.float64(3), Fraction(3)):
        with pytest.raises(TypeError, match=f"{option} must be an int; got"):
            call(name, option, value)
    for value in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"{option} must lie in .*; got {value}"):
            call(name, option, value)


@pytest.mark.parametrize("name,option", [case for case in CASES if case[1] not in INTEGERS])
def test_numbers_are_finite(name, option):
    for value in (math.nan, math.inf, np.float32("nan"), 10**400):
        with pytest.raises(ValueError, match=r"must be a finite number|must lie in"):
            call(name, option, value)


FLAGS = {
    "check_labels": FUNCTIONS["linear_logps"][0],
    "use_weighting": FUNCTIONS["linear_dpo_loss"][0],
    "average_log_prob": FUNCTIONS["linear_dpo_loss"][0],
    "inplace_backward": FUNCTIONS["selective_log_softmax"][0],
    "return_entropy": FUNCTIONS["selective_log_softmax"][0],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag):
    for value in (True, False):
        ours, expected = (FLAGS[flag](**{flag: kind(value)}) for kind in (np.bool_, bool))
        for x, y in zip(ours, expected) if isinstance(ours, tuple) else [(ours, expected)]:
            assert torch.equal(x, y)
    for value in (1, 0, "yes", None, np.int64(1), np.array([True]), torch.tensor(True)):
        with pytest.raises(TypeError, match=f"{flag} must be True or False; got "):
            FLAGS[flag](**{flag: value})


def test_options_are_kept_as_pythons():
    """A graph, an operator's schema and a repr see no numpy."""
    tau = [np.float32(0.5), 1]
    head = HeadOptions(np.int32(7), np.float32(2), np.int64(3), np.float16(1), tau=tau, seed=np.int8(3))
    assert repr(head) == repr(HeadOptions(7, 2.0, 3.0, 1.0, tau=(0.5, 1.0), seed=3))
    checked = PreferenceOptions(**dict.fromkeys(("beta", "f_alpha_divergence_coef"), np.float32(0.5)))
    assert {type(x) for x in vars(checked).values() if not isinstance(x, (str, tuple))} == {float}
    assert set(PREFERENCE_OPTIONS) == set(LOSS) | {"loss_type", "loss_weights", "f_divergence_type"}


def test_compiled_with_numpys_numbers():
    def step(hidden):
        return fastdpo.linear_dpo_loss(hidden, WEIGHT, LABELS, beta=np.float32(0.5), seed=np.int64(3)).loss

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(HIDDEN), step(HIDDEN))


COLUMN = torch.ones(6, 1)
ROW = torch.ones(6)
MESSAGES = [
    (lambda: fastdpo.preference_loss(COLUMN, COLUMN), r"chosen_logps must be 1-D, .*; got shape \(6, 1\)$"),
    (lambda: fastdpo.preference_loss(ROW, COLUMN), r"^rejected_logps must be shaped like chosen_logps, \(6,\); got"),
    (lambda: fastdpo.preference_loss(ROW, ROW[:2]), r"^rejected_logps must be shaped like .*; got \(2,\)$"),
    (lambda: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS.float()), "labels must be int64 or int32 .*float32"),
    (lambda: fastdpo.selective_log_softmax(HIDDEN, LABELS.short()), "index must be int64 or int32; got torch.int16"),
    (
        lambda: fastdpo.linear_logps(HIDDEN.double(), WEIGHT, LABELS),
        "must be fp64 or none; got hidden torch.float64, weight torch.float32$",
    ),
    (lambda: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, lora=(None, WEIGHT, 1)), "^lora's A must be a torch.Tensor"),
    (lambda: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, lora=(WEIGHT, None, 1)), "^lora's B must be a torch.Tensor"),
    (lambda: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, lora=(WEIGHT, WEIGHT)), "^lora must be .*; got 2 of them$"),
    (lambda: fastdpo.linear_token_stats(HIDDEN, WEIGHT, LABELS, stats=3), "^stats must be a collection .*; got 3$"),
    (lambda: fastdpo.linear_token_stats(HIDDEN, WEIGHT, LABELS, stats="entropy"), "^stats must be a collection"),
    (lambda: fastdpo.linear_token_stats(HIDDEN, WEIGHT, LABELS, stats=["mean"]), "^stats must be .*'mean'"),
    (
        lambda: fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, ref_hidden=HIDDEN, ref_bias=ROW),
        r"^ref_bias must have shape \(200,\), .*; got \(6,\)$",
    ),
    (
        lambda: fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, ref_hidden=HIDDEN, ref_bias=True),
        "^ref_bias must be a torch.Tensor; got bool$",
    ),
    (
        lambda: fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, ref_hidden=HIDDEN[:2]),
        r"^ref_hidden must be laid out like hidden, \[4, 3, H\]; got shape \(2, 3, 8\)$",
    ),
    (
        lambda: fastdpo.preference_loss(ROW, ROW, loss_type=["sigmoid", "hinge"], loss_weights=[1, "a"]),
        r"^loss_weights\[1\] must be a number; got 'a'$",
    ),
    (
        lambda: fastdpo.linear_dpo_loss(HIDDEN, WEIGHT, LABELS, ref_hidden=HIDDEN.double()),
        "got ref_hidden torch.float64, its weight torch.float32$",
    ),
    (
        lambda: fastdpo.preference_loss(ROW, ROW, loss_type=["sigmoid"] * 25),
        "^loss_type must name at most 24 losses; got 25$",
    ),
    (
        lambda: fastdpo.linear_logps(HIDDEN, WEIGHT, LABELS, vocab_group="tp"),
        "^vocab_group must be a process group of torch.distributed or a one-dimensional DeviceMesh; got 'tp'$",
    ),
    (
        lambda: fastdpo.preference_loss(ROW, ROW, loss_type="kto", kto_kl=torch.tensor(True)),
        "^kto_kl must be a number or a tensor of one; got torch.bool$",
    ),
]


@pytest.mark.parametrize("refused,message", MESSAGES, ids=[message for _, message in MESSAGES])
def test_messages(refused, message):
    with pytest.raises((TypeError, ValueError), match=message):
        refused()
