"""The namespace of the operators is in one place, which a build for the Hub replaces."""

from __future__ import annotations

import ast

import torch
from test_house import MODULES

from fastdpo import _ops

DECORATORS = ("custom_op", "register_fake", "register_kernel", "triton_op")


def test_every_operator_is_named_by_it():
    assert _ops.add_op_namespace_prefix("x") == "fastdpo::x" and _ops.ops is torch.ops.fastdpo
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in DECORATORS and node.args:
                found.append(ast.unparse(node.args[0]))
                assert found[-1].startswith("add_op_namespace_prefix("), f"{name}, line {node.lineno}: {found[-1]}"
    assert len(found) == 8, found
    for call in found:
        operator = getattr(_ops.ops, ast.parse(call).body[0].value.args[0].value)
        assert operator.default.namespace == "fastdpo"
