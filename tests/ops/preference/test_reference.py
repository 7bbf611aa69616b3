"""The formulas of both engines: against TRL's own code, and at their limits."""

import math

import pytest
import torch
from preference_cases import CASES, B, inputs_of, names_of

from fastdpo.preference import preference_loss


def token_logps(seed, dtype=torch.float64, tokens=9):
    """[2B, T] log-probs of policy and reference, zero outside the mask; every row has a token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2 * B, tokens, generator=generator) < 0.6
    mask[:, 2] = True
    logps = -2 * torch.rand(2, 2 * B, tokens, generator=generator, dtype=torch.float64).to(dtype)
    return logps[0] * mask, logps[1] * mask, mask


TRL_LOSSES = (
    "sigmoid", "robust", "ipo", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
)  # fmt: skip
TRL_CASES = {name: case for name, case in CASES.items() if set(names_of(case)) <= set(TRL_LOSSES)}
# TRL drops the smoothing of sigmoid
TRL_CASES = {
    name: {k: v for k, v in case.items() if k != "label_smoothing" or case["loss_type"] != "sigmoid"}
    for name, case in TRL_CASES.items()
}


@pytest.mark.parametrize("name", TRL_CASES)
def test_equals_dpo_trainer(name, loss_engine):
    import trl_oracle

    case = TRL_CASES[name]
    # TRL knows no fp64 alpha divergence
    dtype = torch.float32 if case.get("f_divergence_type") == "alpha_divergence" else torch.float64
    logps, ref_logps, mask = token_logps(3, dtype)
    logps.requires_grad_()
    expected, logged = trl_oracle.dpo_loss(logps, ref_logps, mask, beta=0.3, **case)
    (expected_grad,) = torch.autograd.grad(expected, logps)

    sums, refs, lengths = logps.sum(1), ref_logps.sum(1), mask.sum(1)
    out = preference_loss(
        sums[:B], sums[B:], refs[:B], refs[B:], beta=0.3, **case,
        chosen_lengths=lengths[:B], rejected_lengths=lengths[B:],
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, logps)
    # exo_pair's log(e) is fp32 in TRL
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6 if "exo_pair" in name else 1e-11
    torch.testing.assert_close(out.loss, expected.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad * mask, expected_grad.to(dtype) * mask, rtol=tolerance, atol=tolerance)
    for side in ("chosen", "rejected"):
        mine = getattr(out, f"{side}_rewards").mean().item()
        assert mine == pytest.approx(logged[f"rewards/{side}"], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_cpo_trainer(smoothing, loss_engine):
    import trl_oracle

    (chosen, rejected), lengths = inputs_of(CASES["cpo"])
    n_w, n_l = (n.clamp(min=1) for n in lengths.values())
    expected = trl_oracle.cpo_losses(chosen, rejected, beta=0.4, label_smoothing=smoothing)
    out = preference_loss(chosen, rejected, loss_type="cpo", beta=0.4, label_smoothing=smoothing)
    torch.testing.assert_close(out.losses, expected[0])
    torch.testing.assert_close(out.chosen_rewards, expected[1])
    config = {"beta": 2.5, "simpo_gamma": 0.8, "label_smoothing": smoothing, "loss_type": "simpo"}
    expected = trl_oracle.cpo_losses(chosen / n_w, rejected / n_l, **config)
    out = preference_loss(chosen, rejected, **config, **lengths)
    torch.testing.assert_close(out.losses, expected[0])
    torch.testing.assert_close(out.rejected_rewards, expected[2])
    expected = trl_oracle.cpo_losses(chosen, rejected, beta=0.4, loss_type="hinge")
    torch.testing.assert_close(preference_loss(chosen, rejected, beta=0.4, loss_type="slic").losses, expected[0])


def test_equals_orpo_trainer(loss_engine):
    import trl_oracle

    (chosen, rejected), lengths = inputs_of(CASES["orpo"])
    n_w, n_l = (n.clamp(min=1) for n in lengths.values())
    expected = trl_oracle.orpo_losses(chosen / n_w, rejected / n_l, beta=0.7)
    out = preference_loss(chosen, rejected, loss_type="orpo", beta=0.7, **lengths)
    torch.testing.assert_close(out.losses, -expected[0].double(), rtol=1e-5, atol=1e-6)  # TRL computes in fp32
    torch.testing.assert_close(out.chosen_rewards.float(), expected[1])


@pytest.mark.parametrize("kl", [0.9, -3.0])
def test_equals_kto_trainer(kl, loss_engine):
    import trl_oracle

    logps, ref_logps, mask = token_logps(4)
    expected = trl_oracle.kto_loss(logps, ref_logps, mask, kl, 0.2, 1.5, 0.4)
    expected = expected[0] if isinstance(expected, tuple) else expected
    sums, refs = logps.sum(1), ref_logps.sum(1)
    out = preference_loss(
        sums[:B], sums[B:], refs[:B], refs[B:], loss_type="kto", beta=0.2, kto_kl=torch.tensor(kl),
        desirable_weight=1.5, undesirable_weight=0.4,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected.to(out.loss))


def test_losses_without_a_trl_counterpart(loss_engine):
    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    c, r, rc, rr = (torch.tensor([x], dtype=torch.float64) for x in (-7.0, -9.0, -5.0, -8.5))
    out = preference_loss(c, r, rc, rr, loss_type="dpop", beta=0.3, dpop_lambda=0.5)
    assert out.losses.item() == pytest.approx(-log_sigmoid(0.3 * (-2.0 + 0.5 - 0.5 * 2.0)), rel=1e-14)
    out = preference_loss(rc, r, c, rr, loss_type="dpop", beta=0.3)  # above the reference: no penalty
    assert out.losses.item() == pytest.approx(-log_sigmoid(0.3 * 2.5), rel=1e-14)
    out = preference_loss(c, r, loss_type="slic", beta=1.0, slic_delta=5.0)
    assert out.losses.item() == pytest.approx(3.0, rel=1e-14)
    out = preference_loss(c, r, rc, rr, beta=0.3, label_smoothing=0.25)  # conservative DPO
    x = 0.3 * -1.5
    assert out.losses.item() == pytest.approx(-0.75 * log_sigmoid(x) - 0.25 * log_sigmoid(-x), rel=1e-14)


def test_reward_model(loss_engine):
    scores = torch.tensor([1.5, -0.2]), torch.tensor([0.5, 0.9])
    expected = torch.log1p(torch.exp(scores[1].double() - scores[0].double()))
    torch.testing.assert_close(preference_loss(*scores, beta=1.0).losses, expected.float())


E80 = math.exp(80.0)
LIMITS = [
    # loss and options, chosen log-ratio, losses, d losses / d chosen; rejected log-ratio 0, beta 1
    ({"loss_type": "sigmoid"}, 1e4, 0.0, 0.0),
    ({"loss_type": "sigmoid"}, -1e4, 1e4, -1.0),
    ({"loss_type": "sigmoid", "label_smoothing": 0.25}, 1e4, 2500.0, 0.25),
    ({"loss_type": "robust", "label_smoothing": 0.25}, 1e4, -5000.0, -0.5),
    ({"loss_type": "robust", "label_smoothing": 0.25}, -1e4, 15000.0, -1.5),
    ({"loss_type": "hinge"}, -1e4, 10001.0, -1.0),
    ({"loss_type": "exo_pair", "label_smoothing": 0.25}, 1e4, -math.log(0.75), 0.0),
    ({"loss_type": "exo_pair", "label_smoothing": 0.25}, -1e4, -math.log(0.25), 0.0),
    ({"loss_type": "apo_zero"}, 1e4, 0.5, 0.0),
    ({"loss_type": "apo_zero"}, -1e4, 1.5, 0.0),
    ({"loss_type": "discopop"}, 1e4, 0.0, 0.0),
    ({"loss_type": "discopop"}, -1e4, 1e4, -1.0),
    ({"loss_type": "discopop"}, -100.0, 100.0, -1.0),  # e^100 is beyond fp32: TRL's NaN
    ({"loss_type": "cpo"}, -1e4, 1e4, -1.0),
    ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, 1e4, math.log1p(math.exp(-1.0)), 0.0),
    ({"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}, -1e4, E80, 0.0),
    ({"loss_type": "sigmoid", "f_divergence_type": "js_divergence"}, 1e4, -math.log(2 / 3), 0.0),
    ({"loss_type": "sigmoid", "f_divergence_type": "js_divergence"}, -1e4, 1e4 - math.log(2), -1.0),
    ({"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence"}, -1e4, 2 * E80, 0.0),
]


@pytest.mark.parametrize("case,chosen,loss,slope", LIMITS)
def test_limits(case, chosen, loss, slope, loss_engine):
    x = torch.tensor([chosen], requires_grad=True)
    out = preference_loss(x, torch.zeros(1), beta=1.0, **case)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.losses.item() == pytest.approx(loss, rel=1e-6)
    assert grad.item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_finite_beyond_fp32_saturates(loss_engine):
    x = torch.tensor([-60.0, 1.0], requires_grad=True)
    lengths = torch.ones(2, dtype=torch.int64)
    case = {"loss_type": "ipo", "f_divergence_type": "forward_kl"}
    out = preference_loss(x, torch.zeros(2), **case, chosen_lengths=lengths, rejected_lengths=lengths)
    largest = torch.finfo(torch.float32).max
    assert out.losses[0] == largest and out.losses[1] < 100
    (grad,) = torch.autograd.grad(out.losses, x, torch.ones(2))
    assert grad[0] == -largest and grad[1].abs() < 100


def test_impossible_rejected_completion(loss_engine):
    """log p = -inf makes the margin +inf: loss 0 and no gradient, as TRL's logsigmoid; not 0 * inf."""
    x = torch.tensor([-3.0], requires_grad=True)
    out = preference_loss(x, torch.tensor([-math.inf]))
    out.loss.backward()
    assert out.loss == 0 and x.grad == 0


def test_certain_completion_in_orpo(loss_engine):
    x = torch.zeros(1, requires_grad=True)
    lengths = torch.zeros(1, dtype=torch.int64)
    out = preference_loss(x, torch.zeros(1), loss_type="orpo", chosen_lengths=lengths, rejected_lengths=lengths)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.1 * math.log(2)) and x.grad.isfinite().all()
