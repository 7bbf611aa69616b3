"""What engines take and return: the orders and the names that several files rely on."""

from __future__ import annotations

from dataclasses import fields

import torch

from fastdpo.head import LoRA
from fastdpo.ops.problem import FOLDED, STATS, Forward, Gradients, Head, Needs, TokenStats


def test_inputs_needs_and_gradients_have_one_order():
    hidden, weight, bias, a, b = (torch.zeros(i) for i in range(1, 6))
    head = Head(hidden, weight, bias, LoRA(a, b, 2.0))
    by_name = {"hidden": hidden, "weight": weight, "bias": bias, "lora_a": a, "lora_b": b}
    assert tuple(by_name) == Needs._fields == tuple(field.name for field in fields(Gradients))
    assert all(x is y for x, y in zip(head.inputs, by_name.values()))
    assert Head(hidden, weight).inputs == (hidden, weight, None, None, None)


def test_every_statistic_has_its_field():
    assert TokenStats._fields == ("logps", *STATS) and STATS == (*FOLDED, "lse")
    assert [field.name for field in fields(Forward)] == ["logps", "lse", *FOLDED, "bitmap", "most_pairs", "selected"]


def test_which_products_a_gradient_needs():
    assert Needs(lora_a=True).of_hidden and not Needs(lora_a=True).of_weight
    assert Needs(bias=True).of_weight and Needs(lora_b=True).of_weight and not Needs(lora_b=True).of_hidden
    assert not any(Needs())
