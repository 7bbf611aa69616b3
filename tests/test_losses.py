"""The table of losses, and what the check of options and sequence log-probs refuses."""

import inspect
import math

import pytest
import torch

from fastdpo.losses import F_DIVERGENCES, LOSSES, MAX_TERMS, PREFERENCE_OPTIONS, PreferenceOptions
from fastdpo.ops.preference import templates
from fastdpo.ops.preference.reference import REFERENCE
from fastdpo.ops.preference.templates import PreferenceLossFunction
from fastdpo.preference import preference_loss


def test_tables_agree():
    assert set(REFERENCE) == set(LOSSES)
    if templates.AVAILABLE:
        assert set(templates.LOSS_IDS) == {x for x in LOSSES if x != "sft" and not LOSSES[x].ranked}
        assert set(templates.DIVERGENCE_IDS) == set(F_DIVERGENCES)
        assert set(templates.OPTION_ORDER) < set(PREFERENCE_OPTIONS)


def test_an_option_of_a_loss_is_an_option():
    for name, loss in LOSSES.items():
        assert set(loss.options) <= set(PREFERENCE_OPTIONS), name


def test_the_public_signature_and_docstring_are_the_table():
    parameters = inspect.signature(preference_loss).parameters
    assert [x for x in parameters if x in PREFERENCE_OPTIONS] == list(PREFERENCE_OPTIONS)
    for name in PREFERENCE_OPTIONS:
        assert parameters[name].default == getattr(PreferenceOptions, name)
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
        assert name in preference_loss.__doc__
    for name in (*LOSSES, *F_DIVERGENCES):
        assert f"``{name}``" in preference_loss.__doc__
    assert "{" not in preference_loss.__doc__


def test_most_terms():
    preference_loss(ONES, ONES, loss_type=["hinge"] * MAX_TERMS)
    with pytest.raises(ValueError, match=f"at most {MAX_TERMS} losses; got {MAX_TERMS + 1}"):
        preference_loss(ONES, ONES, loss_type=["hinge"] * (MAX_TERMS + 1))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="f_divergence"):
        preference_loss(ONES, ONES, f_divergence="js_divergence")


ONES = torch.ones(3)
REFUSED = [
    ({"loss_type": "dpo"}, ValueError, "dpo"),
    ({"loss_type": []}, ValueError, "loss_type"),
    ({"loss_type": ["sigmoid", 3]}, TypeError, "loss_type"),
    ({"loss_type": None}, TypeError, "loss_type"),
    ({"beta": 0.0}, ValueError, "beta.*0.0"),
    ({"beta": -1}, ValueError, "beta.*-1"),
    ({"beta": math.nan}, ValueError, "beta.*nan"),
    ({"beta": math.inf}, ValueError, "beta.*inf"),
    ({"beta": "0.1"}, TypeError, "beta.*'0.1'"),
    ({"beta": True}, TypeError, "beta.*True"),
    ({"loss_weights": [1.0, 2.0]}, ValueError, "loss_weights.*2"),
    ({"loss_weights": 1.0}, TypeError, "loss_weights"),
    ({"loss_weights": [math.inf]}, ValueError, "loss_weights.*inf"),
    ({"label_smoothing": 0.6}, ValueError, "label_smoothing.*0.6"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*-0.1"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing.*robust.*0.5"),
    ({"loss_type": "exo_pair"}, ValueError, "label_smoothing.*exo_pair.*0.0"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing=0.1.*hinge"),
    ({"loss_type": ["hinge", "robust"], "label_smoothing": 0.5}, ValueError, "robust"),
    ({"f_divergence_type": "js"}, ValueError, "'js'.*js_divergence"),
    ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, ValueError, "forward_kl.*bco_pair"),
    ({"loss_type": ["sigmoid", "aot"], "f_divergence_type": "forward_kl"}, ValueError, "aot"),
    ({"f_alpha_divergence_coef": 0.7}, ValueError, "f_alpha_divergence_coef=0.7"),
    ({"f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.7}, ValueError, "js_divergence"),
    ({"discopop_tau": 0.1}, ValueError, "discopop_tau=0.1.*sigmoid.*discopop"),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, ValueError, "discopop_tau"),
    ({"simpo_gamma": 1.0}, ValueError, "simpo_gamma=1.0"),
    ({"dpop_lambda": 1.0}, ValueError, "dpop_lambda=1.0"),
    ({"slic_delta": 2.0}, ValueError, "slic_delta=2.0"),
    ({"kto_kl": 1.0}, ValueError, "kto_kl=1.0"),
    ({"kto_kl": torch.tensor(0.0)}, ValueError, "kto_kl"),
    ({"loss_type": "kto", "kto_kl": torch.ones(2)}, ValueError, r"kto_kl.*\(2,\)"),
    ({"loss_type": "kto", "kto_kl": -1.0}, ValueError, "kto_kl.*-1"),
    ({"desirable_weight": 2.0}, ValueError, "desirable_weight=2.0"),
    ({"loss_type": "kto", "undesirable_weight": -2.0}, ValueError, "undesirable_weight.*-2"),
    ({"loss_type": "ipo"}, ValueError, "chosen_lengths.*ipo"),
    ({"loss_type": "sft"}, ValueError, "chosen_lengths.*sft"),
    ({"loss_type": "ipo", "chosen_lengths": ONES.long()}, ValueError, "rejected_lengths.*ipo"),
    ({"chosen_lengths": ONES}, TypeError, "chosen_lengths.*float32"),
    ({"chosen_lengths": ONES.bool()}, TypeError, "chosen_lengths.*bool"),
    ({"chosen_lengths": [1, 2, 3]}, TypeError, "chosen_lengths.*list"),
    ({"chosen_lengths": torch.ones(2, dtype=torch.int64)}, ValueError, r"chosen_lengths.*\(2,\)"),
    ({"rejected_lengths": torch.tensor([1, -4, 2])}, ValueError, "rejected_lengths.*-4"),
    ({"ref_chosen_logps": ONES}, ValueError, "ref_rejected_logps is None"),
    ({"ref_rejected_logps": ONES}, ValueError, "ref_chosen_logps is None"),
    ({"rejected_logps": torch.ones(1)}, ValueError, r"rejected_logps.*\(1,\)"),
    ({"chosen_logps": torch.ones(3, 1)}, ValueError, r"chosen_logps.*\(3, 1\)"),
    ({"chosen_logps": torch.tensor(1.0)}, ValueError, "chosen_logps"),
    ({"rejected_logps": ONES.long()}, TypeError, "rejected_logps.*int64"),
    ({"chosen_logps": None}, TypeError, "chosen_logps.*NoneType"),
    ({"rejected_logps": ONES.to("meta")}, ValueError, "rejected_logps.*meta"),
    (
        {"loss_type": "simpo", "ref_chosen_logps": ONES, "ref_rejected_logps": ONES},
        ValueError,
        "simpo.*reference",
    ),
    ({"chosen_kl": ONES}, ValueError, "chosen_kl was given.*sigmoid.*used by tdpo1, tdpo2"),
    ({"loss_type": ["sft", "kto"], "chosen_lengths": ONES.long(), "rejected_kl": ONES}, ValueError, "rejected_kl"),
    ({"loss_type": "tdpo1"}, ValueError, "chosen_kl is None, but loss_type 'tdpo1' needs it"),
    ({"loss_type": ["hinge", "tdpo2"], "chosen_kl": ONES}, ValueError, "rejected_kl is None.*tdpo2"),
    ({"loss_type": "tdpo1", "chosen_kl": torch.ones(3, 2), "rejected_kl": ONES}, ValueError, r"chosen_kl.*\(3, 2\)"),
    ({"loss_type": "tdpo1", "chosen_kl": ONES, "rejected_kl": ONES.int()}, TypeError, "rejected_kl.*fp32.*int32"),
    ({"loss_type": "tdpo2", "chosen_kl": 0.3, "rejected_kl": ONES}, TypeError, "chosen_kl.*float"),
    ({"loss_type": "tdpo1", "tdpo_alpha": 0.7}, ValueError, "tdpo_alpha=0.7.*tdpo1.*tdpo2"),
    ({"loss_type": "tdpo2", "tdpo_alpha": -0.7}, ValueError, "tdpo_alpha.*-0.7"),
    ({"loss_type": "tdpo1", "label_smoothing": 0.1}, ValueError, "label_smoothing=0.1.*tdpo1"),
    ({"loss_type": "tdpo1", "f_divergence_type": "forward_kl"}, ValueError, "forward_kl.*tdpo1"),
    ({"loss_type": ["sft", "cpo"], "ref_chosen_logps": ONES, "ref_rejected_logps": ONES}, ValueError, "cpo"),
]


@pytest.mark.parametrize("arguments,error,message", REFUSED)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        preference_loss(**({"chosen_logps": ONES, "rejected_logps": ONES} | arguments))


def test_accepted():
    """Lengths are data, not options; defaults may be written out; sft's rewards may use references."""
    ints = ONES.int()
    preference_loss(ONES, ONES, chosen_lengths=ints, rejected_lengths=ints, simpo_gamma=0.5, discopop_tau=0.05)
    out = preference_loss(ONES, ONES, ONES, ONES, loss_type="sft", chosen_lengths=ints)
    assert (out.chosen_rewards == 0).all()
    preference_loss(ONES, ONES, loss_type=("sigmoid", "sft"), chosen_lengths=ints, f_divergence_type="forward_kl")


NAMES = (
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
    "chosen_kl",
    "rejected_kl",
)


@pytest.mark.parametrize(
    "arguments,error,message",
    [case for case in REFUSED if set(case[0]) <= {*NAMES, "loss_type"} and set(case[0]) & set(NAMES)],
)
def test_the_function_refuses_the_same(arguments, error, message):
    """Native code reads addresses: what is too short, of another type or elsewhere was read as it stood."""
    given = {"chosen_logps": ONES, "rejected_logps": ONES} | arguments
    options = PreferenceOptions(loss_type=given.pop("loss_type", "sigmoid"))
    with pytest.raises(error, match=message):
        PreferenceLossFunction.apply(*[given.get(x) for x in NAMES[:6]], options, *[given.get(x) for x in NAMES[6:]])


@pytest.mark.parametrize("options", [None, "sigmoid", {"beta": 0.1}, 0.1])
def test_the_function_refuses_other_options(options):
    with pytest.raises(TypeError, match="options must be PreferenceOptions"):
        PreferenceLossFunction.apply(ONES, ONES, None, None, None, None, options)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "aot", ["sigmoid", "sft"]])
def test_the_function_is_the_loss(loss_type, loss_engine):
    """Of whatever the door takes: other types, any layout, losses of any kind."""
    chosen, rejected = torch.randn(2, 6)[:, ::2].bfloat16().requires_grad_(), torch.randn(3).double()
    lengths = torch.tensor([1, 5, 0], dtype=torch.int32)
    options = PreferenceOptions(loss_type=loss_type)
    losses = PreferenceLossFunction.apply(*chosen, rejected, rejected, lengths, lengths, options)
    expected = preference_loss(
        *chosen, rejected, rejected, loss_type=loss_type, chosen_lengths=lengths, rejected_lengths=lengths
    ).losses
    assert torch.equal(losses, expected) and losses.dtype == torch.float64
    assert losses.sum().requires_grad


DIFFERENCES = ("sigmoid", "robust", "ipo", "hinge", "exo_pair", "discopop", "sigmoid_norm")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_loss_of_a_difference_of_scores_takes_every_f_divergence(name):
    """Of the scores that a divergence makes of log-ratios it is what it is of log-ratios."""
    given = {"loss_type": name, "chosen_lengths": ONES.long(), "rejected_lengths": ONES.long()}
    given |= {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
    chosen, rejected = torch.tensor([-0.5, 0.25, 1.0]), torch.tensor([0.5, -1.0, 0.75])
    found = preference_loss(chosen, rejected, f_divergence_type="forward_kl", **given)
    expected = preference_loss(-(-chosen).exp(), -(-rejected).exp(), **given)
    torch.testing.assert_close(found.losses, expected.losses)
    assert not torch.allclose(found.losses, preference_loss(chosen, rejected, **given).losses)
