"""preference_loss: against TRL's own code, against the fp64 oracle, at the extremes, and its contract."""

import math

import pytest
import torch
from preference_cases import (
    CASES,
    NAMES,
    UPSTREAM,
    B,
    count_of,
    grads_of,
    inputs_of,
    named,
    names_of,
    oracle,
    token_logps,
)

from fastdpo.losses import LOSSES, PreferenceOptions
from fastdpo.ops.preference.templates import PreferenceLossFunction
from fastdpo.preference import preference_loss

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


def tdpo_source(chosen_margin, rejected_margin, chosen_kl, rejected_kl, beta, alpha, is_tdpo2):
    """tdpo_loss of Vance0124/Token-level-Direct-Preference-Optimization, trainers.py: (losses, both rewards)."""
    kl = alpha * (rejected_kl - chosen_kl.detach()) if is_tdpo2 else rejected_kl - chosen_kl
    losses = -torch.nn.functional.logsigmoid(beta * (chosen_margin - rejected_margin - kl))
    return losses, (beta * (chosen_margin + chosen_kl)).detach(), (beta * (rejected_margin + rejected_kl)).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("name,alpha", [("tdpo1", 1.0), ("tdpo2", 0.5), ("tdpo2", 0.0), ("tdpo2", 1.9)])
def test_equals_tdpo_trainer(name, alpha, reference, dtype, loss_engine):
    """Without a reference the log-probs are the source's margins."""
    tensors = inputs_of({"loss_type": name}, dtype, scale=8.0, seed=3)[0]
    c, r, rc, rr, kc, kr = tensors
    margins = (c - rc, r - rr) if reference else (c, r)
    losses, *rewards = tdpo_source(
        *(x.double() for x in margins), kc.double(), kr.double(), 0.3, alpha, name == "tdpo2"
    )
    options = {"tdpo_alpha": alpha} if name == "tdpo2" else {}
    refs = tensors[2:4] if reference else []
    out = preference_loss(c, r, *refs, loss_type=name, beta=0.3, chosen_kl=kc, rejected_kl=kr, **options)
    rtol = 1e-6 if dtype == torch.float32 else 1e-12
    for mine, wanted in zip(out[1:], (losses, *rewards)):
        torch.testing.assert_close(mine, wanted.to(dtype), rtol=rtol, atol=rtol)
    for grad, wanted in zip(grads_of(out.losses, tensors, UPSTREAM.to(dtype)), grads_of(losses, tensors, UPSTREAM)):
        torch.testing.assert_close(grad, wanted, rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize("names", ["tdpo1", "tdpo2", ["tdpo2", "sft"], ["tdpo1", "tdpo2"], ["tdpo2", "sigmoid"]])
def test_where_the_divergence_has_a_gradient(names, loss_engine):
    """arXiv 2404.11999 eq. 17 detaches the chosen one's; TDPO1's both have one."""
    tensors, lengths = inputs_of({"loss_type": names})
    out = preference_loss(**named(tensors), loss_type=names, **lengths)
    grads = dict(zip(NAMES, grads_of(out.losses, tensors, torch.ones(B, dtype=torch.float64))))
    assert (grads["rejected_kl"] > 0).all()
    if "tdpo1" in names:
        assert (grads["chosen_kl"] < 0).all()
    else:
        assert (grads["chosen_kl"] == 0).all()
    if names in ("tdpo1", ["tdpo1"]):
        torch.testing.assert_close(grads["chosen_kl"], grads["chosen_logps"], rtol=1e-14, atol=0)


def test_impossible_tokens_of_tdpo(loss_engine):
    """A policy without an id that the reference has: an infinite KL, and a loss that says so; never 0 * inf."""
    zeros = torch.zeros(2, dtype=torch.float64)
    kls = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([math.inf, 0.0], [0.0, math.inf])]
    out = preference_loss(zeros, zeros, loss_type="tdpo1", chosen_kl=kls[0], rejected_kl=kls[1])
    assert out.losses.tolist() == [0.0, math.inf]
    for grad, wanted in zip(torch.autograd.grad(out.losses.sum(), kls), ([0.0, -0.1], [0.0, 0.1])):
        assert grad.tolist() == pytest.approx(wanted)


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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounded_once(name, dtype, loss_engine):
    """Losses are fp32 whatever comes in, and within one rounding of fp64 on the same numbers."""
    case = CASES[name]
    tensors, lengths = inputs_of(case, dtype, scale=20.0, seed=5)
    out = preference_loss(**named(tensors), **case, **lengths)
    assert {x.dtype for x in out} == {torch.float32}
    expected = oracle([t.detach() for t in tensors], lengths, **case)
    torch.testing.assert_close(out.losses.double(), expected, rtol=6e-8, atol=1e-12)
    assert out.loss.double().item() == pytest.approx(expected.mean().item(), rel=1.2e-7, abs=1e-12)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected_grads = grads_of(oracle(wide, lengths, **case), wide, UPSTREAM)
    eps = torch.finfo(dtype).eps
    for grad, expected_grad in zip(grads_of(out.losses, tensors, UPSTREAM.float()), expected_grads):
        assert grad.dtype == dtype
        limit = torch.finfo(dtype).max
        torch.testing.assert_close(grad.double(), expected_grad.clamp(-limit, limit), rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    case = CASES[name]
    tensors, lengths = inputs_of(case, scale=2.0, seed=11)
    if "tdpo2" in names_of(case):
        tensors[4].requires_grad_(False)  # its gradient is not the slope

    def losses_and_loss(*tensors):
        out = preference_loss(**named(tensors), **case, **lengths)
        return out.losses, out.loss

    assert torch.autograd.gradcheck(losses_and_loss, tensors, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_extreme_margins_stay_finite(name, dtype, loss_engine):
    case = CASES[name]
    grid = torch.tensor([-1e4, -300.0, -80.0, -1.0, 0.0, 1.0, 80.0, 300.0, 1e4], dtype=dtype)
    chosen, rejected = (x.reshape(-1).clone() for x in torch.meshgrid(grid, grid, indexing="ij"))
    refs = [torch.zeros_like(chosen), torch.full_like(chosen, 0.5)]
    kls = [chosen.flip(0).abs(), rejected.flip(0).abs()]
    tensors = [x.requires_grad_() for x in [chosen, rejected, *refs, *kls][: count_of(case)]]
    lengths = {side: torch.ones(len(chosen), dtype=torch.int64) for side in ("chosen_lengths", "rejected_lengths")}
    out = preference_loss(**named(tensors), **case, **lengths)
    assert out.losses.isfinite().all() and out.loss.isfinite()
    for grad in grads_of(out.losses, tensors, torch.ones_like(out.losses)):
        assert grad.isfinite().all()


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


@pytest.mark.parametrize("name", [name for name in CASES if "sft" not in names_of(CASES[name])])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_in_its_row(name, side, loss_engine):
    case = CASES[name]
    tensors, lengths = inputs_of(case, requires_grad=False)
    tensors[side][2] = math.nan
    tensors = [x.requires_grad_() for x in tensors]
    out = preference_loss(**named(tensors), **case, **lengths)
    rows = out.losses.isnan().nonzero()[:, 0].tolist()
    if "aot_unpaired" in names_of(case) and side == 1:
        # the row that is matched with the NaN's rank also has it
        assert 1 <= len(rows) <= 2
    else:
        assert rows == [2]
    for grad in grads_of(out.losses, tensors[:2], torch.ones_like(out.losses)):
        assert grad[[0, 1, 3, 4, 5, 6]].isnan().sum() <= len(rows) - 1 + (
            any(LOSSES[loss].ranked for loss in names_of(case))
        )


def test_sft_without_tokens_is_zero(loss_engine):
    """0 / 0 when everything is masked."""
    x = torch.zeros(3, requires_grad=True)
    out = preference_loss(x, torch.zeros(3), loss_type="sft", chosen_lengths=torch.zeros(3, dtype=torch.int64))
    out.loss.backward()
    assert out.loss == 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "orpo"])
def test_empty_completion_divides_by_one(name, loss_engine):
    x = torch.tensor([0.0, -4.0], requires_grad=True)
    lengths = torch.tensor([0, 2])
    out = preference_loss(x, x.detach(), loss_type=name, chosen_lengths=lengths, rejected_lengths=lengths)
    out.loss.backward()
    assert out.losses.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name, loss_engine):
    case = CASES[name]
    tensors = [torch.zeros(0, requires_grad=True) for _ in range(count_of(case))]
    lengths = {k: torch.zeros(0, dtype=torch.int64) for k in ("chosen_lengths", "rejected_lengths")}
    out = preference_loss(**named(tensors), **case, **lengths)
    assert out.loss == 0 and out.losses.shape == (0,) and out.chosen_rewards.shape == (0,)
    out.loss.backward()
    assert tensors[0].grad.shape == (0,)


def test_aot_losses_stay_with_their_row(loss_engine):
    """Permuting the rows permutes `losses`, and a row's loss follows its own policy margin."""
    for name in ("aot", "aot_unpaired"):
        tensors, _ = inputs_of(CASES[name], requires_grad=False)
        losses = preference_loss(*tensors, loss_type=name).losses
        order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(preference_loss(*(x[order] for x in tensors), loss_type=name).losses, losses[order])
        # with every reference margin (rejected ratio) the same, the rank decides nothing
        flat = [tensors[0], tensors[1] * 0, tensors[2] * 0, tensors[3] * 0]
        torch.testing.assert_close(preference_loss(*flat, loss_type=name).losses, preference_loss(*flat).losses)


@pytest.mark.parametrize("name", ["sigmoid", "mpo", "ranked and rowwise"])
def test_loss_and_losses_together(name, loss_engine):
    case = CASES[name]
    tensors, lengths = inputs_of(case)
    out = preference_loss(**named(tensors), **case, **lengths)
    together = grads_of(2.0 * out.loss + (out.losses * UPSTREAM).sum(), tensors, None)
    out = preference_loss(**named(tensors), **case, **lengths)
    separate = grads_of(out.losses, tensors, UPSTREAM + 2.0 / B)
    for a, b in zip(together, separate):
        torch.testing.assert_close(a, b)


def test_each_row_has_its_own_upstream(loss_engine):
    """Not the first one's: a zero there must not silence the others."""
    tensors, _ = inputs_of(CASES["sigmoid"])
    out = preference_loss(*tensors)
    grad = grads_of(out.losses, tensors, UPSTREAM)[0]
    unit = grads_of(preference_loss(*tensors).losses, tensors, torch.ones_like(UPSTREAM))[0]
    torch.testing.assert_close(grad, UPSTREAM * unit)


def test_backward_twice_is_the_same(loss_engine):
    tensors, _ = inputs_of(CASES["sigmoid"])
    out = preference_loss(*tensors)
    first = torch.autograd.grad(out.loss, tensors, retain_graph=True)
    second = torch.autograd.grad(out.loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_what_requires_grad(loss_engine):
    tensors, _ = inputs_of(CASES["sigmoid"], requires_grad=False)
    tensors[1].requires_grad_()
    out = preference_loss(*tensors)
    out.loss.backward()
    assert tensors[1].grad is not None and tensors[0].grad is None
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    with torch.no_grad():
        assert not preference_loss(*tensors).loss.requires_grad


def test_double_backward_raises(loss_engine):
    for upstream in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        x = torch.zeros(2, requires_grad=True)
        out = preference_loss(x, torch.zeros(2))
        (grad,) = torch.autograd.grad(out.loss, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.pow(2).sum().backward()


def test_noncontiguous_and_mixed_dtypes(loss_engine):
    grid = torch.randn(4, 2 * B, dtype=torch.float64)[:, ::2]
    mixed = [grid[0].float(), grid[1].half(), grid[2].bfloat16(), grid[3].float()]
    out = preference_loss(*mixed)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.losses, preference_loss(*(x.double() for x in mixed)).losses.float())
    assert preference_loss(grid[0], *mixed[1:]).loss.dtype == torch.float64
    torch.testing.assert_close(preference_loss(*grid).losses, preference_loss(*grid.clone()).losses)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid", "aot"]])
@pytest.mark.parametrize("by_class", [False, True])
def test_compiles_without_graph_break(by_class, loss_type, loss_engine):
    tensors, _ = inputs_of(CASES["sigmoid"], torch.float32)

    def step(*tensors):
        if by_class:
            return PreferenceLossFunction.apply(*tensors, None, None, PreferenceOptions(loss_type=loss_type)).mean()
        return preference_loss(*tensors, loss_type=loss_type).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, step(*tensors))
    expected = torch.autograd.grad(step(*tensors), tensors)
    for grad, expected_grad in zip(torch.autograd.grad(compiled, tensors), expected):
        torch.testing.assert_close(grad, expected_grad)


def test_rewards():
    tensors, lengths = inputs_of(CASES["sigmoid"], requires_grad=False)
    chosen, rejected, ref_chosen, ref_rejected = tensors
    out = preference_loss(*tensors, beta=0.3)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (chosen - ref_chosen))
    torch.testing.assert_close(out.rejected_rewards, 0.3 * (rejected - ref_rejected))
    out = preference_loss(chosen, rejected, beta=0.3)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * chosen)
    n_w = lengths["chosen_lengths"].clamp(min=1)
    for names in ("simpo", "orpo", ["sft", "simpo"]):
        out = preference_loss(chosen, rejected, beta=0.3, loss_type=names, **lengths)
        torch.testing.assert_close(out.chosen_rewards, 0.3 * chosen / n_w)
    kl = {"chosen_kl": -chosen, "rejected_kl": -2 * rejected}
    for names in ("tdpo1", "tdpo2", ["sft", "tdpo2"], ["tdpo1", "tdpo2"]):
        out = preference_loss(*tensors, beta=0.3, loss_type=names, **kl, **lengths)
        torch.testing.assert_close(out.chosen_rewards, 0.3 * (chosen - ref_chosen - chosen))
        torch.testing.assert_close(out.rejected_rewards, 0.3 * (rejected - ref_rejected - 2 * rejected))
    out = preference_loss(*tensors, beta=0.3, loss_type=["tdpo1", "sigmoid"], **kl)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (chosen - ref_chosen))
    out = preference_loss(*tensors, beta=0.3, loss_type="sigmoid_norm", **lengths)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (chosen - ref_chosen))
