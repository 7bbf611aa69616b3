"""The reference's formulas and the templates', far from the middle, value and gradient, in numbers of 120 digits."""

import functools
import math

import mpmath as mp
import pytest
import torch

from fastdpo.losses import LOSSES
from fastdpo.preference import preference_loss

N_W, N_L = 2, 3
K_W, K_L = 0.75, 2.0  # KL(reference || policy)
BETA = 0.1


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(120):
        yield


def S(x):
    return 1 / (1 + mp.exp(-x))


def log_S(x):
    return -mp.log1p(mp.exp(-x))


def relu(x):
    return max(x, mp.mpf(0))


def log_odds(x):
    return x - mp.log(-mp.expm1(x))


def score(t, kind, alpha):
    if kind == "forward_kl":
        return 1 - mp.exp(-t)
    if kind == "js_divergence":
        return mp.log(2) + log_S(t)
    if kind == "alpha_divergence" and alpha != 1:
        return mp.expm1((alpha - 1) * t) / (alpha - 1)
    return t


def formulas(case, w, l):  # noqa: E741
    """The losses at log-probs `w` and `l`, against a reference of zeros."""
    e, beta = mp.mpf(case.get("label_smoothing", 0.0)), mp.mpf(BETA)
    kind, alpha = case.get("f_divergence_type"), mp.mpf(case.get("f_alpha_divergence_coef", 0.5))
    s_w, s_l = score(w, kind, alpha), score(l, kind, alpha)
    x, half, tau = beta * (s_w - s_l), 1 / (2 * beta), mp.mpf(0.05)

    def smoothed(x):
        return -(1 - e) * log_S(x) - e * log_S(-x)

    return {
        "sigmoid": lambda: smoothed(x),
        "robust": lambda: (-(1 - e) * log_S(x) + e * log_S(-x)) / (1 - 2 * e),
        "ipo": lambda: (s_w / N_W - s_l / N_L - half) ** 2,
        "hinge": lambda: relu(1 - x),
        "exo_pair": lambda: S(x) * (log_S(x) - mp.log1p(-e)) + S(-x) * (log_S(-x) - mp.log(e)),
        "nca_pair": lambda: -log_S(beta * w) - log_S(-beta * w) / 2 - log_S(-beta * l) / 2,
        "bco_pair": lambda: -log_S(beta * w) - log_S(-beta * l),
        "sppo_hard": lambda: (w - half) ** 2 + (l + half) ** 2,
        "aot": lambda: smoothed(beta * (w - l)),
        "aot_unpaired": lambda: smoothed(beta * (w - l)),
        "apo_zero": lambda: S(-beta * w) + S(beta * l),
        "apo_down": lambda: S(beta * w) + S(-beta * (w - l)),
        "discopop": lambda: -log_S(x) * S(-x / tau) + mp.exp(-x) * S(x / tau),
        "sigmoid_norm": lambda: -log_S(beta * (s_w / N_W - s_l / N_L)),
        "simpo": lambda: smoothed(beta * (w / N_W - l / N_L) - mp.mpf(0.5)),
        "cpo": lambda: smoothed(beta * (w - l)),
        "orpo": lambda: -beta * log_S(log_odds(w / N_W) - log_odds(l / N_L)),
        "kto": lambda: (S(-beta * w) + S(beta * l)) / 2,
        "dpop": lambda: -log_S(beta * (w - l - 50 * relu(-w))),
        "slic": lambda: relu(1 - beta * (w - l)),
        "tdpo1": lambda: -log_S(beta * (w - l - (mp.mpf(K_L) - K_W))),
        "tdpo2": lambda: -log_S(beta * (w - l - (mp.mpf(K_L) - K_W) / 2)),
    }


def truth(case, w, l):  # noqa: E741
    return formulas(case, w, l)[case["loss_type"]]()


EXACT = tuple(formulas({}, mp.mpf(-1), mp.mpf(-1)))
CASES = {name: {"loss_type": name} for name in EXACT if name != "exo_pair"}
CASES |= {
    f"{name}, smoothed": {"loss_type": name, "label_smoothing": 0.15}
    for name in EXACT
    if LOSSES[name].label_smoothing is not None
}
CASES |= {
    f"{name}, {kind}": {"loss_type": name, "f_divergence_type": kind}
    for name in ("sigmoid", "ipo", "discopop")
    for kind in ("forward_kl", "js_divergence", "alpha_divergence")
}
CASES["nearly reverse_kl"] = {
    "loss_type": "ipo",
    "f_divergence_type": "alpha_divergence",
    "f_alpha_divergence_coef": 1 + 5e-7,
}
SIZES = (1e-12, 1e-7, 1e-2, 1.0, 30.0, 300.0, 1e4)
CERTAIN = (1e-30, 1e-20, 6e-8)  # an fp32 probability of 1


def log_probs(case) -> list[float]:
    if case["loss_type"] == "orpo":
        return [-x for x in CERTAIN + SIZES]
    values = [-x for x in SIZES] + [0.0, *SIZES]
    if case.get("f_divergence_type") in ("forward_kl", "alpha_divergence"):
        return [x for x in values if abs(x) < 80]  # where no exponent is clamped
    return [x for x in values if case["loss_type"] != "dpop" or x != 0]  # a kink


def points(case, dtype) -> list[torch.Tensor]:
    """Log-probs of chosen and of rejected completions, each with each."""
    grid = torch.tensor(log_probs(case), dtype=dtype)
    return [x.reshape(-1).clone().requires_grad_() for x in torch.meshgrid(grid, grid, indexing="ij")]


@functools.cache  # both engines are compared with it, and it takes longer than they do
def exactly(name, dtype) -> list[tuple]:
    """(loss, its derivatives by the chosen and by the rejected log-prob) of each of the points."""
    case, found = CASES[name], []
    for w, l in zip(*([mp.mpf(v) for v in x.tolist()] for x in points(case, dtype))):  # noqa: E741
        expected = [truth(case, w, l)]
        for k, at in enumerate((w, l)):
            h = (abs(at) or 1) * mp.mpf(10) ** -40
            step = (h, 0) if k == 0 else (0, h)
            rise = truth(case, w + step[0], l + step[1]) - truth(case, w - step[0], l - step[1])
            expected.append(rise / (2 * h))
        found.append(tuple(expected))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_equals_exact_arithmetic(name, dtype, loss_engine):
    case = CASES[name]
    tensors = points(case, dtype)
    chosen, rejected = (x.tolist() for x in tensors)
    refs = [] if LOSSES[case["loss_type"]].reference_free else [torch.zeros_like(tensors[0])] * 2
    if case["loss_type"].startswith("aot"):  # one row at a time, where rank decides nothing
        rows = [[x[i : i + 1] for x in (*tensors, *refs)] for i in range(len(chosen))]
    else:
        rows = [[*tensors, *refs]]
    kls = {"chosen_kl": K_W, "rejected_kl": K_L} if LOSSES[case["loss_type"]].kl else {}
    losses = torch.cat(
        [
            preference_loss(
                *row, beta=BETA, **case,
                chosen_lengths=torch.full(row[0].shape, N_W), rejected_lengths=torch.full(row[0].shape, N_L),
                **{name: torch.full_like(row[0], kl, requires_grad=False) for name, kl in kls.items()},
            ).losses
            for row in rows
        ]
    )  # fmt: skip
    grads = torch.autograd.grad(losses.sum(), tensors, materialize_grads=True)

    # Below the first bound a result is fp32's or fp64's denormal; the second is what differences of terms may lose.
    rtol, smallest = (3e-7, 1e-37) if dtype == torch.float32 else (1e-12, 1e-300)
    cancels = case["loss_type"] in ("apo_down", "ipo", "exo_pair") or "f_divergence_type" in case
    atol = 3e-15 if cancels else smallest
    for row, expected in enumerate(exactly(name, dtype)):
        got = (losses[row].item(), grads[0][row].item(), grads[1][row].item())
        for what, mine, wanted in zip(("loss", "dchosen", "drejected"), got, expected):
            assert abs(mine - wanted) <= rtol * abs(wanted) + atol, (what, chosen[row], rejected[row], mine, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", [0.0, -1e-45, -1e-38, 1e-9])
def test_certain_completions_of_orpo(zero, dtype, loss_engine):
    """A mean log-prob of 0 counts as -2^-24; so does what lies between it and -2^-126."""
    ones = torch.ones(3, dtype=torch.int64)
    lengths = {"chosen_lengths": ones, "rejected_lengths": ones}
    w = torch.tensor([zero, -1.0, zero], dtype=dtype, requires_grad=True)
    l = torch.tensor([-1.0, zero, zero], dtype=dtype, requires_grad=True)  # noqa: E741
    losses = preference_loss(w, l, loss_type="orpo", beta=1.0, **lengths).losses
    dw, dl = torch.autograd.grad(losses.sum(), [w, l])
    odds, certain = 1 / math.expm1(1.0), 1 / math.expm1(2.0**-24)  # of -1, of -2^-24
    expected = torch.tensor([math.log1p(odds / certain), math.log1p(certain / odds), math.log(2)], dtype=dtype)
    rtol = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=0)
    # d log-odds = 1 / (1 - p) = 1 + odds
    share = odds / (odds + certain)
    torch.testing.assert_close(
        dw, torch.tensor([-share * (1 + certain), (share - 1) * (1 + odds), -(1 + certain) / 2], dtype=dtype),
        rtol=rtol, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        dl, torch.tensor([share * (1 + odds), (1 - share) * (1 + certain), (1 + certain) / 2], dtype=dtype),
        rtol=rtol, atol=0,
    )  # fmt: skip
