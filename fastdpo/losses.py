"""The preference losses by name, what each needs, and the one check of all that a call of them is given.

This table is the only list of losses in Python; the expressions are csrc/shared/preference_losses.h and, in torch,
ops/preference/reference.py.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .sequences import cast
from .tensors import plain, traced
from .validation import FLOATS, check_number

F = TypeVar("F")

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


SYMBOLS = {  # of the formulas; `w` is the chosen completion, `l` the rejected one
    "chosen": "log-prob of the chosen completion, summed over its tokens",
    "rejected": "log-prob of the rejected completion, summed over its tokens",
    "a": "chosen - ref_chosen",
    "b": "rejected - ref_rejected",
    "s": "scores: f_divergence_type's of a and of b; a and b themselves for reverse_kl",
    "d": "s_w - s_l",
    "n": "completion tokens",
    "k": "KL(reference || policy), summed over a completion's tokens",
    "S": "the sigmoid",
    "e": "label_smoothing",
    "smoothed": "(1-e) times the loss, and e times the loss with both completions exchanged",
}


class Loss(NamedTuple):
    """What one loss reads; its formula is written in SYMBOLS."""

    formula: str
    source: str
    label_smoothing: str | None = None  # the interval it may lie in, of ends 0 and 0.5; None: not used
    f_divergence: bool = False  # built on the difference of scores, so that f-DPO applies
    reference_free: bool = False  # never looks at the reference
    ranked: bool = False  # re-matches the batch's rows by rank, so that a weight per row has no meaning
    per_token_reward: bool = False  # its implicit reward is per token, and so are the rewards its trainer reports
    kl: bool = False  # reads KL(reference || policy), and its implicit reward has it
    lengths: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # beyond beta, label_smoothing and the f-divergence


FLIP = "[0, 0.5]"  # above one half, smoothing would prefer the rejected completion
BOTH_LENGTHS = ("chosen_lengths", "rejected_lengths")
BOTH_KLS = ("chosen_kl", "rejected_kl")

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
        label_smoothing="[0, 0.5)",
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
        label_smoothing="(0, 0.5]",
        f_divergence=True,
    ),
    "nca_pair": Loss("-log S(beta a) - 0.5 log S(-beta a) - 0.5 log S(-beta b)", "NCA, arXiv 2402.05369"),
    "bco_pair": Loss("-log S(beta a) - log S(-beta b)", "BCO, arXiv 2404.04656"),
    "sppo_hard": Loss("(a - 0.5/beta)^2 + (b + 0.5/beta)^2", "SPPO, arXiv 2405.00675"),
    "aot": Loss(
        "smoothed -log S(beta (sorted policy margin - sorted reference margin))",
        "AOT, arXiv 2406.05882",
        label_smoothing=FLIP,
        ranked=True,
    ),
    "aot_unpaired": Loss(
        "smoothed -log S(beta (sorted a - sorted b))",
        "AOT, arXiv 2406.05882",
        label_smoothing=FLIP,
        ranked=True,
    ),
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
        per_token_reward=True,
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
        per_token_reward=True,
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
    "tdpo1": Loss("-log S(beta (a - b - (k_l - k_w)))", "TDPO, arXiv 2404.11999 eqs. 15 and 16", kl=True),
    "tdpo2": Loss(
        "-log S(beta (a - b - tdpo_alpha (k_l - k_w))), k_w without gradient",
        "TDPO, arXiv 2404.11999 eq. 17",
        kl=True,
        options=("tdpo_alpha",),
    ),
}


def _users(option: str) -> tuple[str, ...]:
    users = []
    for name, loss in LOSSES.items():
        if option in loss.options or (option == "label_smoothing" and loss.label_smoothing is not None):
            users.append(name)
    return tuple(users)


def _check_kl(name: str, value) -> float | Tensor:
    if not isinstance(value, Tensor):
        return check_number(name, value, 0)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number; got a tensor of shape {tuple(value.shape)}")
    value = plain(name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of one; got {value.dtype}")
    return value.detach().reshape(()).clamp(min=0)


# How an option is checked where it is not the default.
_ANY, _CHECK_KL = {"check": check_number}, {"check": _check_kl}
_POSITIVE, _NOT_NEGATIVE = {"check": partial(check_number, low=0, above=True)}, {"check": partial(check_number, low=0)}
MAX_TERMS = 24  # of csrc/preference_structs.h


@dataclass(frozen=True)
class PreferenceOptions:
    """The options of `preference_loss`, checked when they are made: every error names the option and its value. This
    is the one list of them."""

    beta: float = field(default=0.1, metadata=_POSITIVE)
    loss_type: str | list[str] = "sigmoid"  # a tuple once checked
    loss_weights: list[float] | None = None  # a tuple as long as loss_type once checked
    label_smoothing: float = field(default=0.0, metadata=_ANY)
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = field(default=0.5, metadata=_ANY)
    discopop_tau: float = field(default=0.05, metadata=_POSITIVE)
    simpo_gamma: float = field(default=0.5, metadata=_ANY)
    dpop_lambda: float = field(default=50.0, metadata=_NOT_NEGATIVE)
    slic_delta: float = field(default=1.0, metadata=_NOT_NEGATIVE)
    kto_kl: float | Tensor = field(default=0.0, metadata=_CHECK_KL)
    desirable_weight: float = field(default=1.0, metadata=_NOT_NEGATIVE)
    undesirable_weight: float = field(default=1.0, metadata=_NOT_NEGATIVE)
    tdpo_alpha: float = field(default=0.5, metadata=_NOT_NEGATIVE)

    def __post_init__(self):
        names, weights = _check_losses(self.loss_type, self.loss_weights)
        object.__setattr__(self, "loss_type", names)
        object.__setattr__(self, "loss_weights", weights)
        for option, check in _CHECKS.items():
            value, default = getattr(self, option), getattr(PreferenceOptions, option)
            if type(value) is type(default) and value == default:
                continue
            value = check(option, value)
            object.__setattr__(self, option, value)
            users = _USERS[option]
            if users and (isinstance(value, Tensor) or value != default) and not any(x in users for x in names):
                raise ValueError(
                    f"{option}={value!r} has no effect on loss_type {list(names)}; it is used by {', '.join(users)}"
                )
        smoothing = self.label_smoothing
        for name in names:
            interval = LOSSES[name].label_smoothing
            if interval is None:
                continue
            low, high = smoothing > 0 or interval[0] == "[", smoothing < 0.5 or interval[-1] == "]"
            if not (0 <= smoothing <= 0.5 and low and high):
                raise ValueError(f"label_smoothing must lie in {interval} for loss_type {name!r}; got {smoothing!r}")
        if self.f_divergence_type != "reverse_kl" or self.f_alpha_divergence_coef != 0.5:
            _check_divergence(self.f_divergence_type, self.f_alpha_divergence_coef, names)

    def all_are(self, field: str) -> bool:
        """Whether every loss is so but ``sft``, a likelihood that may stand beside them; not of ``sft`` alone."""
        found = False
        for name in self.loss_type:
            if name != "sft":
                found = True
                if not getattr(LOSSES[name], field):
                    return False
        return found

    def needs_kl(self) -> bool:
        return any(LOSSES[name].kl for name in self.loss_type)

    def check_kl(self, given: str) -> None:
        """Raises where no loss reads it."""
        if not self.needs_kl():
            users = ", ".join(name for name, loss in LOSSES.items() if loss.kl)
            raise ValueError(
                f"{given} was given, but loss_type {list(self.loss_type)} never looks at it; it is used by {users}"
            )

    def check_reference(self, given: str) -> None:
        """Raises where no loss looks at it; the rewards of ``sft`` alone do."""
        if self.all_are("reference_free"):
            raise ValueError(f"{given} was given, but loss_type {list(self.loss_type)} never looks at a reference")


PREFERENCE_OPTIONS = tuple(option.name for option in fields(PreferenceOptions))
_CHECKS = {option.name: option.metadata["check"] for option in fields(PreferenceOptions) if option.metadata}
_USERS = {option: _users(option) for option in _CHECKS}  # none for what every loss reads


def states_options(function: F) -> F:
    """Decorates what takes `**options`: the options join its signature, and the table's names its docstring."""
    given = list(inspect.signature(function).parameters.values())[:-1]
    options = list(inspect.signature(PreferenceOptions).parameters.values())
    keywords = [x.replace(kind=x.KEYWORD_ONLY) for x in options] + [x for x in given if x.kind == x.KEYWORD_ONLY]
    parameters = [x for x in given if x.kind != x.KEYWORD_ONLY] + keywords
    function.__signature__ = inspect.signature(function).replace(parameters=parameters)

    def fill(**lists) -> None:
        for key, items in lists.items():
            text = textwrap.fill(", ".join(items), 100, subsequent_indent=" " * 12)
            function.__doc__ = function.__doc__.replace(f"{{{key}}}", text)

    if function.__doc__ is not None:  # as it is under python -OO
        intervals = {f"``{name}``": loss.label_smoothing for name, loss in LOSSES.items() if loss.label_smoothing}
        fill(
            losses=[f"``{name}``" for name in LOSSES],
            divergences=[f"``{name}``" for name in F_DIVERGENCES],
            f_divergence=[f"``{name}``" for name, loss in LOSSES.items() if loss.f_divergence],
            lengths=[f"``{name}``" for name, loss in LOSSES.items() if loss.lengths],
            kl=[f"``{name}``" for name, loss in LOSSES.items() if loss.kl],
            label_smoothing=[f"{interval} for {name}" for name, interval in intervals.items()],
        )
    return function


def _check_losses(loss_type, loss_weights) -> tuple[tuple[str, ...], tuple[float, ...]]:
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"loss_type must be a name or a list of names; got {loss_type!r}")
    if not names:
        raise ValueError("loss_type must name at least one loss; got an empty list")
    if len(names) > MAX_TERMS:
        raise ValueError(f"loss_type must name at most {MAX_TERMS} losses; got {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"loss_type must be a name or a list of names; got {loss_type!r}")
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


def _check_divergence(kind, coef: float, names: tuple[str, ...]) -> None:
    if kind not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type {kind!r} is unknown; the divergences are {', '.join(F_DIVERGENCES)}")
    if kind != "reverse_kl":
        # Of the losses without scores only sft may stand beside: it has no divergence to speak of.
        allowed = [name for name, loss in LOSSES.items() if loss.f_divergence]
        others = [name for name in names if name not in allowed and name != "sft"]
        if others or all(name == "sft" for name in names):
            raise ValueError(
                f"f_divergence_type={kind!r} has no meaning for loss_type {others or list(names)}; it is for "
                f"{', '.join(allowed)} (sft may stand beside them)"
            )
    if kind != "alpha_divergence" and coef != PreferenceOptions.f_alpha_divergence_coef:
        raise ValueError(
            f"f_alpha_divergence_coef={coef!r} has no effect with f_divergence_type={kind!r}; it is used by "
            "'alpha_divergence'"
        )


class CheckedSequences(NamedTuple):
    """[B] tensors of one device: log-probs of one type, fp32 or fp64, and lengths of int64."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_lengths: Tensor | None
    rejected_lengths: Tensor | None
    chosen_kl: Tensor | None
    rejected_kl: Tensor | None


_NAMES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", *BOTH_LENGTHS, *BOTH_KLS)


def check_sequences(options: PreferenceOptions, *tensors) -> CheckedSequences:
    """ValueError or TypeError, naming the argument and its value, unless the eight tensors fit."""
    ref_chosen, ref_rejected = tensors[2:4]
    if ref_chosen is not None or ref_rejected is not None:
        options.check_reference("ref_chosen_logps")
        if ref_chosen is None or ref_rejected is None:
            missing = "ref_chosen_logps" if ref_chosen is None else "ref_rejected_logps"
            raise ValueError(f"{missing} is None: give the reference log-probs of both sides, or neither")
    like, dtype, checked = None, torch.float32, []
    for name, x in zip(_NAMES, tensors):
        if x is None and name not in ("chosen_logps", "rejected_logps"):
            for loss in options.loss_type:
                if name in LOSSES[loss].lengths or (name in BOTH_KLS and LOSSES[loss].kl):
                    raise ValueError(f"{name} is None, but loss_type {loss!r} needs it")
            checked.append(None)
            continue
        if name in BOTH_KLS:
            options.check_kl(name)
        x = plain(name, x)
        is_length = name in BOTH_LENGTHS
        if is_length and x.dtype not in INTEGERS:
            raise TypeError(f"{name} must be a tensor of integers; got {x.dtype}")
        if not is_length and x.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
        like = x if like is None else like
        if like.ndim != 1:
            raise ValueError(f"{name} must be 1-D, one log-prob per sequence; got shape {tuple(like.shape)}")
        if x.shape != like.shape:
            raise ValueError(f"{name} must be shaped like chosen_logps, {tuple(like.shape)}; got {tuple(x.shape)}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device} but chosen_logps is on {like.device}")
        if not is_length:
            dtype = torch.promote_types(dtype, x.dtype)
        # Reading values would wait for a GPU and break a compiled graph; there 0 or less counts as 1.
        elif x.device.type == "cpu" and not traced(x) and x.numel() and x.min() < 0:
            raise ValueError(f"{name} must not be negative; got {int(x.min())}")
        checked.append(x)
    for i, x in enumerate(checked):
        wanted = torch.int64 if _NAMES[i] in BOTH_LENGTHS else dtype
        if x is not None and x.dtype != wanted:
            checked[i] = x.to(wanted) if _NAMES[i] in BOTH_LENGTHS else cast(x, wanted)
    return CheckedSequences(*checked)
