"""The preference losses by name, what each needs, and the check of the options that go with them.

This table is the only list of losses in Python; the expressions are csrc/shared/preference_loss.h and, in torch,
ops/preference_reference.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import plain
from .validation import check_number

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class Interval(NamedTuple):
    low: float
    high: float
    closed: str = "both"  # or "left", "right": the ends that belong to it

    def __contains__(self, x) -> bool:
        above = x >= self.low if self.closed in ("both", "left") else x > self.low
        below = x <= self.high if self.closed in ("both", "right") else x < self.high
        return above and below

    def __str__(self) -> str:
        left = "[" if self.closed in ("both", "left") else "("
        right = "]" if self.closed in ("both", "right") else ")"
        return f"{left}{self.low:g}, {self.high:g}{right}"


class Loss(NamedTuple):
    """What one loss reads. `d` is s_w - s_l, `S` the sigmoid, `e` the label smoothing, `n` a length."""

    formula: str
    source: str
    label_smoothing: Interval | None = None  # None: not used
    f_divergence: bool = False  # built on the difference of scores, so that f-DPO applies
    reference_free: bool = False  # never looks at the reference
    lengths: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # beyond beta, label_smoothing and the f-divergence


# Above one half, smoothing would prefer the rejected completion.
FLIP = Interval(0.0, 0.5)
BOTH_LENGTHS = ("chosen_lengths", "rejected_lengths")

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(
        "-(1-e) log S(beta d) - e log S(-beta d)",
        "DPO, arXiv 2305.18290; smoothed: cDPO, ericmitchell.ai/cdpo.pdf",
        label_smoothing=FLIP,
        f_divergence=True,
    ),
    "robust": Loss(
        "[-(1-e) log S(beta d) + e log S(-beta d)] / (1-2e)",
        "Robust DPO, arXiv 2403.00409",
        label_smoothing=Interval(0.0, 0.5, "left"),
        f_divergence=True,
    ),
    "ipo": Loss(
        "(s_w/n_w - s_l/n_l - 1/(2 beta))^2",
        "IPO, arXiv 2310.12036",
        f_divergence=True,
        lengths=BOTH_LENGTHS,
    ),
    "hinge": Loss("relu(1 - beta d)", "RSO, arXiv 2309.06657", f_divergence=True),
    "exo_pair": Loss(
        "S(beta d) [log S(beta d) - log(1-e)] + S(-beta d) [log S(-beta d) - log e]",
        "EXO, arXiv 2402.00856",
        label_smoothing=Interval(0.0, 0.5, "right"),
        f_divergence=True,
    ),
    "nca_pair": Loss("-log S(beta a) - 0.5 log S(-beta a) - 0.5 log S(-beta b)", "NCA, arXiv 2402.05369"),
    "bco_pair": Loss("-log S(beta a) - log S(-beta b)", "BCO, arXiv 2404.04656"),
    "sppo_hard": Loss("(a - 0.5/beta)^2 + (b + 0.5/beta)^2", "SPPO, arXiv 2405.00675"),
    "aot": Loss(
        "smoothed -log S(beta (sorted policy margin - sorted reference margin))",
        "AOT, arXiv 2406.05882",
        label_smoothing=FLIP,
    ),
    "aot_unpaired": Loss("smoothed -log S(beta (sorted a - sorted b))", "AOT, arXiv 2406.05882", label_smoothing=FLIP),
    "apo_zero": Loss("1 - S(beta a) + S(beta b)", "APO, arXiv 2408.06266"),
    "apo_down": Loss("S(beta a) + 1 - S(beta (a - b))", "APO, arXiv 2408.06266"),
    "discopop": Loss(
        "-log S(x) (1-m) + e^-x m, x = beta d, m = S(x / discopop_tau)",
        "DiscoPOP, arXiv 2406.08414",
        f_divergence=True,
        options=("discopop_tau",),
    ),
    "sigmoid_norm": Loss(
        "-log S(beta (s_w/n_w - s_l/n_l))",
        "length-normalised DPO, arXiv 2411.15124",
        f_divergence=True,
        lengths=BOTH_LENGTHS,
    ),
    "sft": Loss("-sum(chosen) / sum(n_w), over the batch", "negative log-likelihood", lengths=("chosen_lengths",)),
    "simpo": Loss(
        "smoothed -log S(beta (chosen/n_w - rejected/n_l) - simpo_gamma)",
        "SimPO, arXiv 2405.14734",
        label_smoothing=FLIP,
        reference_free=True,
        lengths=BOTH_LENGTHS,
        options=("simpo_gamma",),
    ),
    "cpo": Loss(
        "smoothed -log S(beta (chosen - rejected))",
        "CPO, arXiv 2401.08417",
        label_smoothing=FLIP,
        reference_free=True,
    ),
    "orpo": Loss(
        "-beta log S(log odds_w - log odds_l), odds of e^(logp/n)",
        "ORPO, arXiv 2403.07691",
        reference_free=True,
        lengths=BOTH_LENGTHS,
    ),
    "kto": Loss(
        "[desirable_weight (1 - S(beta (a - kto_kl))) + undesirable_weight (1 - S(beta (kto_kl - b)))] / 2",
        "KTO, arXiv 2402.01306",
        options=("kto_kl", "desirable_weight", "undesirable_weight"),
    ),
    "dpop": Loss(
        "-log S(beta (a - b - dpop_lambda relu(-a)))",
        "DPO-positive, arXiv 2402.13228",
        options=("dpop_lambda",),
    ),
    "slic": Loss(
        "relu(slic_delta - beta (chosen - rejected))",
        "SLiC-HF, arXiv 2305.10425",
        reference_free=True,
        options=("slic_delta",),
    ),
}

# The batch's shape enters these: they re-match rows by rank, so a weight per row has no meaning.
RANKED = ("aot", "aot_unpaired")
# Their implicit reward is per token, and so are the rewards their trainers report.
PER_TOKEN_REWARD = ("simpo", "orpo")


class PreferenceOptions(NamedTuple):
    """The options of `preference_loss`; `check_options` makes one."""

    beta: float = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"  # a tuple once checked
    loss_weights: tuple[float, ...] | None = None  # as long as loss_type once checked
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    slic_delta: float = 1.0
    kto_kl: float | Tensor = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        return tuple(zip(self.loss_type, self.loss_weights))

    def only(self, terms) -> PreferenceOptions:
        """The same options for some of the terms."""
        names, weights = zip(*terms)
        return self._replace(loss_type=names, loss_weights=weights)

    @property
    def uses_reference(self) -> bool:
        return any(not LOSSES[name].reference_free and name != "sft" for name in self.loss_type)

    @property
    def per_token_reward(self) -> bool:
        names = [name for name in self.loss_type if name != "sft"]
        return bool(names) and all(name in PER_TOKEN_REWARD for name in names)


DEFAULTS = PreferenceOptions()
MAX_TERMS = 24  # of csrc/shared/preference_batch.h


def _check_losses(loss_type, loss_weights) -> tuple[tuple[str, ...], tuple[float, ...]]:
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"loss_type must be a name or a list of names; got {loss_type!r}")
    if not names:
        raise ValueError("loss_type must name at least one loss; got an empty list")
    if len(names) > MAX_TERMS:
        raise ValueError(f"loss_type must name at most {MAX_TERMS} losses; got {len(names)}")
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"loss_type {name!r} is unknown; the losses are {', '.join(LOSSES)}")
    if loss_weights is None:
        return tuple(names), (1.0,) * len(names)
    if not isinstance(loss_weights, (list, tuple)):
        raise TypeError(f"loss_weights must be a list of numbers; got {loss_weights!r}")
    if len(loss_weights) != len(names):
        raise ValueError(
            f"loss_weights must have one number per loss, {len(names)} for loss_type {list(names)}; got "
            f"{len(loss_weights)}"
        )
    return tuple(names), tuple(check_number(f"loss_weights[{i}]", x) for i, x in enumerate(loss_weights))


def _check_kl(value) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"kto_kl must be one number; got a tensor of shape {tuple(value.shape)}")
        value = plain("kto_kl", value)
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"kto_kl must be a number or a tensor of one; got {value.dtype}")
        return value.detach().reshape(()).clamp(min=0)
    return check_number("kto_kl", value, 0)


def _check_label_smoothing(value, names) -> float:
    value = check_number("label_smoothing", value)
    used = [(name, LOSSES[name].label_smoothing) for name in names if LOSSES[name].label_smoothing is not None]
    for name, interval in used:
        if value not in interval:
            raise ValueError(f"label_smoothing must lie in {interval} for loss_type {name!r}; got {value!r}")
    if value != 0.0 and not used:
        raise ValueError(_unused("label_smoothing", value, names))
    return value


def _unused(name, value, names) -> str:
    users = [loss for loss, spec in LOSSES.items() if name in spec.options]
    if name == "label_smoothing":
        users = [loss for loss, spec in LOSSES.items() if spec.label_smoothing is not None]
    return f"{name}={value!r} has no effect on loss_type {list(names)}; it is used by {', '.join(users)}"


def _check_divergence(kind, coef, names) -> float:
    if kind not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type {kind!r} is unknown; the divergences are {', '.join(F_DIVERGENCES)}")
    if kind != "reverse_kl":
        # Of the losses without scores only sft may stand beside: it has no divergence to speak of.
        allowed = [name for name, spec in LOSSES.items() if spec.f_divergence]
        others = [name for name in names if name not in allowed and name != "sft"]
        if others or all(name == "sft" for name in names):
            raise ValueError(
                f"f_divergence_type={kind!r} has no meaning for loss_type {others or list(names)}; it is for "
                f"{', '.join(allowed)} (sft may stand beside them)"
            )
    coef = check_number("f_alpha_divergence_coef", coef)
    if kind != "alpha_divergence" and coef != DEFAULTS.f_alpha_divergence_coef:
        raise ValueError(
            f"f_alpha_divergence_coef={coef!r} has no effect with f_divergence_type={kind!r}; it is used by "
            "'alpha_divergence'"
        )
    return coef


def check_options(**options) -> PreferenceOptions:
    """Normalises and checks the options of `preference_loss`; every error names the option and its value."""
    given = PreferenceOptions(**options)
    names, weights = _check_losses(given.loss_type, given.loss_weights)
    checked = given._replace(
        beta=check_number("beta", given.beta, 0, above=True),
        loss_type=names,
        loss_weights=weights,
        label_smoothing=_check_label_smoothing(given.label_smoothing, names),
        f_alpha_divergence_coef=_check_divergence(given.f_divergence_type, given.f_alpha_divergence_coef, names),
        discopop_tau=check_number("discopop_tau", given.discopop_tau, 0, above=True),
        simpo_gamma=check_number("simpo_gamma", given.simpo_gamma),
        dpop_lambda=check_number("dpop_lambda", given.dpop_lambda, 0),
        slic_delta=check_number("slic_delta", given.slic_delta, 0),
        kto_kl=_check_kl(given.kto_kl),
        desirable_weight=check_number("desirable_weight", given.desirable_weight, 0),
        undesirable_weight=check_number("undesirable_weight", given.undesirable_weight, 0),
    )
    used = {option for name in names for option in LOSSES[name].options}
    for option in sorted({option for spec in LOSSES.values() for option in spec.options} - used):
        value = getattr(checked, option)
        if isinstance(value, Tensor) or value != getattr(DEFAULTS, option):
            raise ValueError(_unused(option, value, names))
    return checked


def check_reference_use(options: PreferenceOptions, given: bool, name: str) -> None:
    only_sft = all(loss == "sft" for loss in options.loss_type)  # whose rewards still look at the reference
    if given and not options.uses_reference and not only_sft:
        raise ValueError(f"{name} was given, but loss_type {list(options.loss_type)} never looks at a reference")
