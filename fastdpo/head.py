"""What a head is: its options, the transform of its logits, LoRA on it; and the one check of all a call is given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .accumulate import check_accumulates
from .distributed.groups import process_group
from .tensors import plain
from .validation import FLOATS, check_flag, check_integer, check_number

_KEYS = 2**64
_STREAMS = 0x9E3779B97F4A7C15  # how far apart the keys of two streams lie

# Chosen so that on a trained head every error (overall, of sure tokens, of the worst token, of dweight) stays below
# that of bf16 logits, and that training, where Adam amplifies noise in rows of the head with tiny gradients, follows
# the exact run. One set of pairs serves both gradients: benchmarks/results/.
DEFAULT_TAU = 2.0**-10
FROZEN_HEAD_TAU = 2.0**-9  # where dhidden alone is wanted


class LogitTransform(NamedTuple):
    """z = softcap * tanh(scale * (product + bias) / softcap) / temperature."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0

    def applied(self, product: Tensor) -> Tensor:
        """The logits of products of hidden states and head, the bias added; those themselves where nothing is to do."""
        z = product if self.scale == 1.0 else product * self.scale
        z = self.softcap * torch.tanh(z / self.softcap) if self.softcap else z
        return z if self.temperature == 1.0 else z / self.temperature


class LoRA(NamedTuple):
    """weight + scale * b @ a, never formed."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float


class Routing(NamedTuple):
    """Which (token, block) pairs the backward computes, by the rule of routing.py: those kept at the smallest `tau`;
    where two gradients are wanted at different ones, the other takes a second, smaller set inside them."""

    taus: tuple[float, ...]  # of the sets, ascending: one or two; none where every pair is computed
    hidden_set: int  # which of them dhidden takes; -1: not wanted
    weight_set: int
    seed: Tensor | int | None = None  # 0-d int64 on hidden's device, the key's 64 bits; None in the backward

    @staticmethod
    def of(tau_hidden: float, tau_weight: float, seed: Tensor | int | None = None) -> Routing:
        """A negative `tau` says that this gradient is not wanted."""
        taus = [tau_hidden] if tau_hidden == tau_weight else sorted((tau_hidden, tau_weight))
        taus = tuple(taus[1:] if taus[0] < 0 else taus)
        hidden_set = -1 if tau_hidden < 0 else taus.index(tau_hidden)
        weight_set = -1 if tau_weight < 0 else taus.index(tau_weight)
        return Routing(taus, hidden_set, weight_set, seed)

    @property
    def tau(self) -> float:
        return self.taus[0]

    @property
    def second_tau(self) -> float | None:
        return self.taus[1] if len(self.taus) == 2 else None


def taus(tau: float | tuple[float, float] | None, of_weight: bool = True) -> tuple[float, float]:
    """(dhidden, dweight) for `tau` as the public functions take it; `of_weight`: the head takes a gradient."""
    if tau is None:
        tau = DEFAULT_TAU if of_weight else FROZEN_HEAD_TAU
    return tau if isinstance(tau, tuple) else (tau, tau)


def _signed(key: int) -> int:
    """The key's 64 bits as int64 has them."""
    return (key + _KEYS // 2) % _KEYS - _KEYS // 2


def _positive(name: str, value) -> float | None:
    return None if value is None else check_number(name, value, 0, above=True)


def _backward(name: str, value) -> str:
    if value not in ("routed", "exact"):
        raise ValueError(f"backward must be 'routed' or 'exact'; got {value!r}")
    return value


def _tau(name: str, value) -> float | tuple[float, float] | None:
    if value is None:
        return None
    two = isinstance(value, (tuple, list))
    if two and len(value) != 2:
        raise ValueError(f"tau must be one number or two, (dhidden, dweight); got {value!r}")
    numbers = tuple(check_number("tau", x) for x in (value if two else (value,)))
    if not all(0.0 <= x <= 1.0 for x in numbers):
        raise ValueError(f"tau must lie in [0, 1]; got {value!r}")
    return numbers if two else numbers[0]


def _seed(name: str, value) -> int | None:
    if value is None or (type(value) is int and 0 <= value < _KEYS):
        return value
    return check_integer(name, value, 0, _KEYS)


def _accumulate_into(name: str, value) -> str | None:
    if value not in (None, "grad", "main_grad"):
        raise ValueError(f"accumulate_into must be None, 'grad' or 'main_grad'; got {value!r}")
    return value


def _group(name: str, value):
    return None if value is None else process_group(name, value)


@dataclass(frozen=True)
class HeadOptions:
    """The non-tensor options of one call, checked when it is made. This is the one list of them."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    backward: str = "routed"
    tau: float | tuple[float, float] | None = None
    seed: int | None = None
    vocab_group: object | None = None
    check_labels: bool = False
    accumulate_into: str | None = None
    stream: int = field(default=0, repr=False)  # no option: ranks with other tokens of a batch draw from others

    def __post_init__(self):
        for name, check in _CHECKS.items():
            value, default = getattr(self, name), getattr(HeadOptions, name)
            if type(value) is not type(default) or value != default:
                object.__setattr__(self, name, check(name, value))
        if self.backward == "exact" and (self.tau is not None or self.seed is not None):
            given = "tau" if self.tau is not None else "seed"
            raise ValueError(f"{given} belongs to backward='routed'; got {getattr(self, given)!r} with 'exact'")

    @property
    def transform(self) -> LogitTransform:
        return LogitTransform(self.logit_scale, self.softcap or 0.0, self.temperature)

    def key(self, device: torch.device) -> Tensor | None:
        """The 64 bits of the draws' key as a 0-d int64 on the device.

        A key is drawn without grad mode too: the first pass of reentrant checkpointing has none, and what it does not
        draw never advances the generator, which the recomputation sets back; every step would repeat the first one's.
        """
        if self.backward == "exact":
            return None
        if self.seed is not None:
            return torch.full((), _signed(self.seed + self.stream * _STREAMS), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            return None
        key = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
        return key + _signed(self.stream * _STREAMS) if self.stream else key

    def routing(self, of_hidden: bool, of_weight: bool) -> Routing:
        """Which pairs the backward computes for the gradients that are wanted."""
        if self.backward == "exact":
            return Routing((), -1, -1)
        hidden, weight = taus(self.tau, of_weight)
        return Routing.of(hidden if of_hidden else -1.0, weight if of_weight else -1.0)


_CHECKS = {
    "ignore_index": check_integer,
    "logit_scale": check_number,
    "softcap": _positive,
    "temperature": _positive,
    "backward": _backward,
    "tau": _tau,
    "seed": _seed,
    "vocab_group": _group,
    "check_labels": check_flag,
    "accumulate_into": _accumulate_into,
}
HEAD_OPTIONS = tuple(option.name for option in fields(HeadOptions) if option.name != "stream")


class CheckedHead(NamedTuple):
    """The tensors of one call, plain and of shapes, types and devices that fit."""

    tensors: tuple[Tensor | None, ...]  # hidden [..., H], weight, bias, LoRA's A and B, labels [N], or [N, K] for K > 1
    lora_scale: float
    shape: torch.Size  # of labels


def check_head(hidden, weight, labels, bias, lora, options: HeadOptions, prefix: str = "") -> CheckedHead:
    """ValueError or TypeError, naming the argument and its value, unless everything fits. With a `vocab_group` labels
    are checked when its ranks have told how many columns they have. `prefix`: of the arguments' names."""
    of_hidden, of_weight, of_bias = (f"{prefix}{name}" for name in ("hidden", "weight", "bias"))
    hidden, weight, labels = plain(of_hidden, hidden), plain(of_weight, weight), plain("labels", labels)
    bias = None if bias is None else plain(of_bias, bias)
    lora = None if lora is None else _check_lora(lora)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32 token ids; got {labels.dtype}")
    named = {of_hidden: hidden, of_weight: weight, of_bias: bias}
    if lora is not None:
        named.update({"lora A": lora.a, "lora B": lora.b})
    device, doubles, count = hidden.device, 0, 0
    for name, x in named.items():
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} but {of_hidden} is on {device}")
        doubles, count = doubles + (x.dtype is torch.float64), count + 1
    if labels.device != device:
        raise ValueError(f"labels is on {labels.device} but {of_hidden} is on {device}")
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"{of_hidden} must be [..., H] and {of_weight} [V, H]; got shapes {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    vocab_size, hidden_size = weight.shape
    if vocab_size == 0 or hidden_size == 0:
        raise ValueError(f"{of_weight} must have at least one row and one column; got shape {tuple(weight.shape)}")
    if hidden.shape[-1] != hidden_size:
        raise ValueError(f"{of_hidden} has H = {hidden.shape[-1]} but {of_weight} has H = {hidden_size}")
    rows, several = hidden.shape[:-1], labels.ndim == hidden.ndim
    if labels.shape[: len(rows)] != rows or not (labels.ndim == len(rows) or (several and labels.shape[-1] > 0)):
        raise ValueError(
            f"labels must be shaped like {of_hidden} without its last dimension, {tuple(rows)}, or with K > 0 labels "
            f"in its place, {(*rows, 'K')}; got {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != (vocab_size,):
        raise ValueError(f"{of_bias} must have shape ({vocab_size},); got {tuple(bias.shape)}")
    if lora is not None:
        lora_rank = lora.a.shape[0] if lora.a.ndim == 2 else -1
        if lora.a.ndim != 2 or lora.a.shape[1] != hidden_size or lora.b.shape != (vocab_size, lora_rank):
            raise ValueError(
                f"lora must be (A [r, {hidden_size}], B [{vocab_size}, r], scale); got shapes "
                f"{tuple(lora.a.shape)} and {tuple(lora.b.shape)}"
            )
    if doubles not in (0, count):
        kinds = ", ".join(f"{name} {x.dtype}" for name, x in named.items() if x is not None)
        raise TypeError(f"fp64 is for checking: all of the head and {of_hidden} must be fp64 or none; got {kinds}")
    check_accumulates(weight, options.accumulate_into)
    if options.check_labels and options.vocab_group is None:
        check_labels(labels, options, vocab_size)
    lora_a, lora_b, lora_scale = lora or (None, None, 1.0)
    flat = labels.reshape(-1, labels.shape[-1]) if several and labels.shape[-1] > 1 else labels.reshape(-1)
    return CheckedHead((hidden, weight, bias, lora_a, lora_b, flat), lora_scale, labels.shape)


def _check_lora(lora) -> LoRA:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        given = f"{len(lora)} of them" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise ValueError(f"lora must be (A [r, H], B [V, r], scale); got {given}")
    for name, x in zip("AB", lora):
        if not isinstance(x, Tensor):
            raise TypeError(f"lora's {name} must be a torch.Tensor; got {type(x).__name__}")
    return LoRA(plain("lora A", lora[0]), plain("lora B", lora[1]), check_number("lora's scale", lora[2]))


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would multiply in: the autocast type, or the common type of both."""
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    # torch 2.6 cannot trace is_autocast_available
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if dtype != torch.float64 and known and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype


def check_labels(labels: Tensor, options: HeadOptions, vocab_size: int) -> None:
    if labels.device.type == "meta":
        raise ValueError("check_labels=True reads the values of labels, which are on the meta device and have none")
    bad = (labels != options.ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"labels[{', '.join(map(str, position))}] = {labels[position].item()} is neither in [0, {vocab_size}) "
            f"nor ignore_index ({options.ignore_index})"
        )
