"""Numbers, flags and names at the public door: every error names the argument and the value it had."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection

import torch
from torch import Tensor

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
