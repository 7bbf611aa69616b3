"""What a release of TRL passes to the functions that are replaced: read from their signatures, by name."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

SUPPORTED = "0.24 to 1.16"

# Attributes of what Unsloth puts in place of TRL's autograd Functions
UNSLOTH_MARKS = ("_unsloth_fused_linear", "_unsloth_device_patched", "_unsloth_cpu_dispatch")


def version() -> str:
    return getattr(sys.modules.get("trl"), "__version__", "(unknown version)")


def release() -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", version())
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def unknown(what: str) -> RuntimeError:
    return RuntimeError(f"TRL {version()} {what}, which fastdpo does not know; it supports TRL {SUPPORTED}")


def of_unsloth(function) -> bool:
    return any(getattr(function, mark, False) for mark in UNSLOTH_MARKS)


class Signature:
    """Of the forward, without ctx, of an autograd Function of TRL.

    Args:
        name: what it is called in errors, "log-prob".
        forward: None where the Function has none, and is none.
        parameters: TRL's parameter -> its name here; None: it has no meaning here.
        required: names here that have to be there.

    Raises:
        RuntimeError: not every call that it allows can be served.
    """

    def __init__(self, name: str, forward: Callable | None, parameters: dict[str, str | None], required: Iterable[str]):
        if forward is None:
            raise unknown(f"has a {name} function that is no autograd Function (another library's?)")
        whole = inspect.signature(forward)
        own = list(whole.parameters.values())[1:]
        served = [parameters.get(parameter.name) for parameter in own]
        problems = [f"lacks {wanted!r} under a known name" for wanted in required if wanted not in served]
        for parameter in own:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                problems.append(f"takes {parameter}")
            elif parameter.name not in parameters and parameter.default is parameter.empty:
                problems.append(f"needs {parameter.name!r}")
        if problems:
            raise unknown(f"has a {name} function{whole} that {' and '.join(problems)}")
        self.name, self.parameters = name, parameters
        self.signature = whole.replace(parameters=own)

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.signature.parameters

    def call(self, args, kwargs) -> dict[str, object]:
        """The arguments by their names here. Raises RuntimeError for one that is not known and not its default."""
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            default = self.signature.parameters[name].default
            if name not in self.parameters and value is not default and value != default:
                raise unknown(f"passes {name}={value!r} to its {self.name} function")
        return {self.parameters[name]: value for name, value in given.arguments.items() if name in self.parameters}


def select_rows(theirs, _):
    """In the place of `_use_triton` in a module of TRL, by which it drops the rows that do not count or not.

    CPU tensors gain by it as CUDA tensors do. Elsewhere (Neuron recompiles per shape) TRL's answer stands.
    """
    return lambda device: device.type == "cpu" or theirs(device)


def only_selects_rows(module: ModuleType, function: str) -> bool:
    """Whether `function` alone asks `_use_triton` in this module of TRL: nothing else may change."""
    try:
        definitions = ast.parse(inspect.getsource(module)).body
    except OSError:  # installed without its source
        return False
    users = [x for x in definitions if any(getattr(y, "id", None) == "_use_triton" for y in ast.walk(x))]
    return [getattr(x, "name", None) for x in users] == [function]
