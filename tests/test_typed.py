"""What type checkers read is complete, and says what runs: `make types` checks the rest, and tests/typed_calls.py."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import fastdpo
from fastdpo import integrations, layers, microbatches, typed
from fastdpo.head import HEAD_OPTIONS, HeadOptions
from fastdpo.losses import PREFERENCE_OPTIONS, PreferenceOptions
from fastdpo.models.options import MODEL_OPTIONS, TRAINER_OPTIONS

OF_DPO = ("ld_alpha", "use_weighting", "average_log_prob", "seq_group", "seq_grads")
FIRST = ("beta", "loss_type")  # LinearDPOLoss's own parameters
FILES = Path(integrations.__file__).parent.glob("*.py")
TRAINERS = [path.stem for path in FILES if "\npatch, unpatch = " in path.read_text()]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("TrainerOptions", TRAINER_OPTIONS),
        ("ModelOptions", MODEL_OPTIONS),
        ("LossOptions", PREFERENCE_OPTIONS),
        ("OtherLossOptions", set(PREFERENCE_OPTIONS) - {*FIRST}),
        ("DPOOptions", (*HEAD_OPTIONS, *PREFERENCE_OPTIONS, *OF_DPO)),
        ("OtherDPOOptions", {*HEAD_OPTIONS, *PREFERENCE_OPTIONS, *OF_DPO} - {*FIRST}),
    ],
)
def test_options_are_those_of_the_tables(options, names):
    assert set(getattr(typed, options).__optional_keys__) == set(names)


def test_their_types_are_those_of_the_tables():
    tree = ast.parse(Path(typed.__file__).read_text())
    types = {node.target.id: ast.unparse(node.annotation) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    compared = [x for x in (*fields(HeadOptions), *fields(PreferenceOptions)) if x.name in types]
    assert len(compared) == len(HEAD_OPTIONS) + len(PREFERENCE_OPTIONS)
    types["vocab_group"] = "object | None"  # where it is checked
    assert {x.name: x.type for x in compared} == {x.name: types[x.name] for x in compared}


def public() -> dict[str, object]:
    found = {f"fastdpo.{name}": getattr(fastdpo, name) for name in fastdpo.__all__ if name != "__version__"}
    found |= {f"fastdpo.integrations.{name}": getattr(integrations, name) for name in integrations.__all__}
    for module in (layers, microbatches):
        own = {name: x for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
        found |= {f"{module.__name__}.{name}": x for name, x in own.items() if not name.startswith("_")}
    for name in TRAINERS:
        module = importlib.import_module(f"fastdpo.integrations.{name}")
        found |= {f"{module.__name__}.{of}": getattr(module, of) for of in ("patch", "unpatch")}
    ours = {name: x for name, x in found.items() if getattr(x, "__module__", "").startswith("fastdpo")}
    return {name: x for name, x in ours.items() if inspect.isclass(x) or inspect.isroutine(x)}


def functions(name: str, x) -> Iterator[tuple[str, Callable]]:
    if not inspect.isclass(x):
        yield name, x
        return
    autograds = ("forward", "backward") if issubclass(x, torch.autograd.Function) else ()  # called by torch alone
    for method, value in vars(x).items():
        value = getattr(value, "__func__", value)  # of static methods
        ours = inspect.isfunction(value) and value.__module__.startswith("fastdpo")
        if ours and method not in autograds and (not method.startswith("_") or method == "__init__"):
            yield f"{name}.{method}", value


def test_every_public_function_has_every_annotation():
    seen, missing = 0, []
    for name, x in public().items():
        for of, function in functions(name, x):
            function = inspect.unwrap(function)
            code = function.__code__
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
            lacking = {*code.co_varnames[:count], "return"} - {"self", "cls"} - function.__annotations__.keys()
            seen += 1
            if lacking:
                missing.append(f"{of}: {', '.join(sorted(lacking))}")
    assert seen > 40 and not missing, missing


def test_the_marker_is_installed():
    assert (Path(fastdpo.__file__).parent / "py.typed").exists()
    assert '"py.typed"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
