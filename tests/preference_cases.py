"""Preference losses to try: every loss and what changes its formula, inputs for each, and what they should give."""

from __future__ import annotations

import torch

from fastdpo.losses import F_DIVERGENCES, LOSSES, PreferenceOptions
from fastdpo.ops.preference.reference import BatchInputs, batch_losses_ref

B = 7

SMOOTHED = [name for name, loss in LOSSES.items() if loss.label_smoothing is not None]
WITH_SCORES = [name for name, loss in LOSSES.items() if loss.f_divergence]

# Every loss, every variation that changes its formula.
CASES = {
    name: {"loss_type": name}
    for name, loss in LOSSES.items()
    if loss.label_smoothing is None or loss.label_smoothing[0] == "["
}
CASES |= {f"{name}-smoothed": {"loss_type": name, "label_smoothing": 0.15} for name in SMOOTHED}
for name in WITH_SCORES:
    smoothing = {"label_smoothing": 0.15} if LOSSES[name].label_smoothing else {}
    for kind in F_DIVERGENCES[1:]:
        CASES[f"{name}-{kind}"] = {"loss_type": name, "f_divergence_type": kind, **smoothing}
    for alpha in (2.0, 1.0):
        CASES[f"{name}-alpha={alpha}"] = {
            "loss_type": name,
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": alpha,
            **smoothing,
        }
CASES |= {
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "rpo": {
        "loss_type": ["sigmoid", "sft"],
        "f_divergence_type": "js_divergence",
        "loss_weights": [1.0, 0.3],
    },
    "ranked and rowwise": {"loss_type": ["aot", "hinge", "aot_unpaired"], "loss_weights": [0.5, -2.0, 3.0]},
    "sft+orpo": {"loss_type": ["sft", "orpo"]},
    "discopop-tau": {"loss_type": "discopop", "discopop_tau": 2.0},
    "simpo-gamma": {"loss_type": "simpo", "simpo_gamma": -0.7, "beta": 2.0},
    "dpop-lambda": {"loss_type": "dpop", "dpop_lambda": 0.3},
    "slic-delta": {"loss_type": "slic", "slic_delta": 0.2},
    "kto-kl": {"loss_type": "kto", "kto_kl": 1.7, "desirable_weight": 1.3, "undesirable_weight": 0.6},
    "kto-tensor": {"loss_type": "kto", "kto_kl": torch.tensor([0.4])},
    "tdpo2-alpha": {"loss_type": "tdpo2", "tdpo_alpha": 1.7},
    "tdpo1+others": {"loss_type": ["ipo", "tdpo1", "sft", "tdpo2"], "loss_weights": [0.5, 2.0, 0.1, -0.7]},
}
NAMES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_kl", "rejected_kl")


def names_of(case):
    names = case["loss_type"]
    return [names] if isinstance(names, str) else names


def count_of(case):
    """How many of NAMES a case's losses look at: references are not for all of them, divergences for few."""
    names = names_of(case)
    if any(LOSSES[name].kl for name in names):
        return 6
    return 2 if all(LOSSES[name].reference_free or name == "sft" for name in names) else 4


def named(tensors):
    """Of preference_loss."""
    return dict(zip(NAMES, tensors))


def inputs_of(case, dtype=torch.float64, scale=3.0, seed=0, requires_grad=True):
    """What a case's losses look at, in the order of NAMES, and lengths."""
    generator = torch.Generator().manual_seed(seed)
    logps = -scale * torch.rand(4, B, dtype=torch.float64, generator=generator) - 0.1
    lengths = torch.randint(0, 9, (2, B), generator=generator)
    if count_of(case) == 6:
        logps = torch.cat([logps, scale * torch.rand(2, B, dtype=torch.float64, generator=generator)])
    tensors = [x.to(dtype).clone().requires_grad_(requires_grad) for x in logps[: count_of(case)]]
    return tensors, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def oracle(tensors, lengths, **case):
    """fp64 losses by autograd on the reference."""
    options = PreferenceOptions(**case)
    x = [t.double() for t in tensors] + [None] * (6 - len(tensors))
    return batch_losses_ref(options, BatchInputs(*x[:4], *lengths.values(), *x[4:]))[1]


def grads_of(losses, tensors, upstream):
    grads = torch.autograd.grad(losses, tensors, upstream, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors)]


UPSTREAM = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 1e-3, 7.0], dtype=torch.float64)  # the first is not the others


def token_logps(seed, dtype=torch.float64, tokens=9):
    """[2B, T] log-probs of policy and reference, zero outside the mask; every row has a token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2 * B, tokens, generator=generator) < 0.6
    mask[:, 2] = True
    logps = -2 * torch.rand(2, 2 * B, tokens, generator=generator, dtype=torch.float64).to(dtype)
    return logps[0] * mask, logps[1] * mask, mask
