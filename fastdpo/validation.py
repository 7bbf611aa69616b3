"""The checks at the public door, once per call: every error names the argument and the value it had."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import VocabShards
from .routing import parse_tau
from .tensors import plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_number(name: str, value, low: float = -math.inf, *, above: bool = False) -> float:
    """`value`, Python's number or numpy's, as a finite float of at least `low` (more than `low` with `above`)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        value = _of_numpy(value, numbers.Real, f"{name} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < low or (above and number == low):
        bound = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}; got {_shown(value)}")
    return number


def check_integer(name: str, value, low: int = -(2**63), high: int = 2**63) -> int:
    """`value`, Python's integer or numpy's, as an int in [low, high)."""
    if type(value) is not int:
        value = operator.index(_of_numpy(value, numbers.Integral, f"{name} must be an int"))
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{_power(low)}, {_power(high)}); got {value}")
    return value


def check_flag(name: str, value) -> bool:
    """`value`, Python's bool or numpy's."""
    return value if isinstance(value, bool) else _numpys_bool(value, name)


@torch._disable_dynamo  # which makes arrays and tensors of numpy's scalars
def _of_numpy(value, kind: type, problem: str):
    if type(value).__module__ == "numpy" and value.shape == ():
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{problem}; got {_shown(value)}")
    return value


@torch._disable_dynamo
def _numpys_bool(value, name: str) -> bool:
    if getattr(getattr(value, "dtype", None), "kind", None) != "b" or value.ndim:
        raise TypeError(f"{name} must be True or False; got {_shown(value)}")
    return bool(value)


def check_names(name: str, value, known: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(value, Collection):
        raise TypeError(f"{name} must be a collection of names among {known}; got {_shown(value)}")
    if isinstance(value, str) or not all(x in known for x in value):
        raise ValueError(f"{name} must be a collection of names among {known}; got {value!r}")
    return tuple(value)


def _shown(value) -> str:
    if isinstance(value, Tensor):  # its value may be on a device, and its gradient would be lost
        return f"a tensor of shape {tuple(value.shape)}: pass its item()"
    return f"{value!r}"


def _power(x: int) -> str:
    return {-(2**63): "-2**63", 2**63: "2**63", 2**64: "2**64"}.get(x, str(x))


def _is_group(group) -> bool:
    return torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)


def _check_tau(tau) -> float | tuple[float, ...] | None:
    """numpy's numbers as Python's; what they may be is `parse_tau`'s to say."""
    if tau is None:
        return None
    if isinstance(tau, (tuple, list)):
        tau = tuple(check_number("tau", value) for value in tau)
    else:
        tau = check_number("tau", tau)
    parse_tau(tau)
    return tau


@dataclass(frozen=True)
class HeadOptions:
    """The non-tensor options of one call, validated."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    backward: str = "routed"
    tau: float | tuple[float, float] | None = None
    seed: int | None = None
    lora_scale: float = 1.0
    vocab_group: object | None = None
    check_labels: bool = False

    def __post_init__(self):
        def keep(name: str, value) -> None:
            object.__setattr__(self, name, value)

        keep("logit_scale", check_number("logit_scale", self.logit_scale))
        keep("temperature", check_number("temperature", self.temperature, 0, above=True))
        if self.softcap is not None:
            keep("softcap", check_number("softcap", self.softcap, 0, above=True))
        keep("ignore_index", check_integer("ignore_index", self.ignore_index))
        keep("check_labels", check_flag("check_labels", self.check_labels))
        if self.backward not in ("routed", "exact"):
            raise ValueError(f"backward must be 'routed' or 'exact'; got {self.backward!r}")
        if self.backward == "exact" and (self.tau is not None or self.seed is not None):
            given = "tau" if self.tau is not None else "seed"
            raise ValueError(f"{given} belongs to backward='routed'; got {getattr(self, given)!r} with 'exact'")
        keep("tau", _check_tau(self.tau))
        if self.seed is not None:
            keep("seed", check_integer("seed", self.seed, 0, 2**64))
        if self.vocab_group is not None and not _is_group(self.vocab_group):
            raise TypeError(f"vocab_group must be a process group of torch.distributed; got {self.vocab_group!r}")


def lora_scale(lora) -> float:
    if lora is None:
        return 1.0
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        given = f"{len(lora)} of them" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise ValueError(f"lora must be (A [r, H], B [V, r], scale); got {given}")
    for name, x in zip("AB", lora):
        if not isinstance(x, Tensor):
            raise TypeError(f"lora's {name} must be a torch.Tensor; got {type(x).__name__}")
    return check_number("lora's scale", lora[2])


def check_head(hidden, weight, labels, bias, lora_a, lora_b, options: HeadOptions) -> tuple[Tensor | None, ...]:
    """The six as plain tensors."""
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "bias": bias,
        "lora A": lora_a,
        "lora B": lora_b,
    }
    for name, x in tensors.items():
        if x is None and name in ("bias", "lora A", "lora B"):
            continue
        x = tensors[name] = plain(name, x)
        if name == "labels":
            if x.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"labels must be int64 or int32 token ids; got {x.dtype}")
        elif x.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} but hidden is on {hidden.device}")
    hidden, weight, labels, bias, lora_a, lora_b = tensors.values()
    if hidden.ndim < 1 or weight.ndim != 2:
        raise ValueError(
            f"hidden must be [..., H] and weight [V, H]; got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    vocab_size, hidden_size = weight.shape
    if vocab_size == 0 or hidden_size == 0:
        raise ValueError(f"weight must have at least one row and one column; got shape {tuple(weight.shape)}")
    if hidden.shape[-1] != hidden_size:
        raise ValueError(f"hidden has H = {hidden.shape[-1]} but weight has H = {hidden_size}")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must be shaped like hidden without its last dimension, {tuple(hidden.shape[:-1])}; "
            f"got {tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != (vocab_size,):
        raise ValueError(f"bias must have shape ({vocab_size},); got {tuple(bias.shape)}")
    if lora_a is not None:
        rank = lora_a.shape[0] if lora_a.ndim == 2 else -1
        if lora_a.ndim != 2 or lora_a.shape[1] != hidden_size or lora_b.shape != (vocab_size, rank):
            raise ValueError(
                f"lora must be (A [r, {hidden_size}], B [{vocab_size}, r], scale); got shapes "
                f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
    doubles = [x.dtype == torch.float64 for x in (hidden, weight, bias, lora_a, lora_b) if x is not None]
    if any(doubles) and not all(doubles):
        kinds = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items() if x is not None and name != "labels")
        raise TypeError(f"fp64 is for checking: all of the head and hidden must be fp64 or none; got {kinds}")
    if options.check_labels:
        _check_labels(labels, options, VocabShards.of(options.vocab_group, weight).vocab_size)
    return hidden, weight, labels, bias, lora_a, lora_b


def _check_labels(labels: Tensor, options: HeadOptions, vocab_size: int) -> None:
    if labels.device.type == "meta":
        raise ValueError("check_labels=True reads the values of labels, which are on the meta device and have none")
    bad = (labels != options.ignore_index) & ((labels < 0) | (labels >= vocab_size))
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"labels[{', '.join(map(str, position))}] = {labels[position].item()} is neither in [0, {vocab_size}) "
            f"nor ignore_index ({options.ignore_index})"
        )
