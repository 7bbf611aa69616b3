"""The checks at the public door, once per call: every error names the argument and the value it had."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import VocabShards
from .routing import parse_tau
from .tensors import plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_number(name: str, value, low: float = -math.inf, *, above: bool = False) -> float:
    """`value` as a finite float of at least `low` (more than `low` with `above`)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    value = float(value)
    if not math.isfinite(value) or value < low or (above and value == low):
        bound = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}; got {value!r}")
    return value


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
        check_number("logit_scale", self.logit_scale)
        check_number("temperature", self.temperature, 0, above=True)
        if self.softcap is not None:
            check_number("softcap", self.softcap, 0, above=True)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"ignore_index must be an int; got {self.ignore_index!r}")
        if self.backward not in ("routed", "exact"):
            raise ValueError(f"backward must be 'routed' or 'exact'; got {self.backward!r}")
        if self.backward == "exact" and (self.tau is not None or self.seed is not None):
            given = "tau" if self.tau is not None else "seed"
            raise ValueError(f"{given} belongs to backward='routed'; got {getattr(self, given)!r} with 'exact'")
        parse_tau(self.tau)
        if self.seed is not None:
            if isinstance(self.seed, bool) or not isinstance(self.seed, int):
                raise TypeError(f"seed must be an int or None; got {self.seed!r}")
            if not 0 <= self.seed < 2**64:
                raise ValueError(f"seed must lie in [0, 2**64); got {self.seed}")


def lora_scale(lora) -> float:
    if lora is None:
        return 1.0
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise ValueError(f"lora must be (A [r, H], B [V, r], scale); got {type(lora).__name__}: {lora!r}"[:200])
    check_number("lora's scale", lora[2])
    return float(lora[2])


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
                raise TypeError(f"labels must be int64 token ids; got {x.dtype}")
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
        raise TypeError("fp64 is for checking: all of hidden, weight, bias and lora must be fp64, or none")
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
