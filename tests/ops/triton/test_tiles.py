"""The tiles that GPUs are given, which the interpreter has others for: each must make the same numbers."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
import triton_divergence_case
from heads import peaked_head
from triton_case import Case

from fastdpo.head import LogitTransform
from fastdpo.ops.triton import backward, exact, exact_tiles, launch, tokens
from fastdpo.ops.triton.launch import Target

ARCHITECTURES = (80, 90, 100, 120)
HALF, FP32, MIXED = (torch.float16, None), (torch.float32, None), (torch.float16, torch.float32)
OPERANDS = {  # (types of hidden and weight, H, options, kinds of their tiles)
    "half": (*HALF, 1040, False, ("half",)),
    "short": (*HALF, 64, False, ("short",)),
    "mixed": (*MIXED, 64, False, ("narrow",)),
    "fp32": (*FP32, 48, False, ("fp32",)),
    "unaligned": (*HALF, 51, False, ("unaligned",)),
    "unaligned fp32": (*FP32, 51, False, ("unaligned",)),
    "options": (*HALF, 64, True, ("half", "narrow", "low_rank", "routed")),
    "options fp32": (*FP32, 48, True, ("fp32", "crowded", "low_rank")),
    "options, unaligned": (*FP32, 51, True, ("unaligned", "low_rank")),
}
ROUTED = {"exact": None, "routed": (0.2, 0.05)}


def differing(part: str) -> list[tuple[int, str]]:
    """(architecture, operands) whose tiles of these kernels no earlier architecture has."""
    found = {}
    for architecture in ARCHITECTURES:
        target = Target(architecture, 2)
        for name, (*_, kinds) in OPERANDS.items():
            tiles = [
                launch.tile(kernel, target, kind)
                for kernel, table in launch._TILES.items()
                for kind in kinds
                if (part in kernel) and (kind in table or kind in launch._LIKE)
            ]
            through_tma = target.has_tma and "unaligned" not in kinds
            found.setdefault((name, through_tma, *tiles), (architecture, name))
    return list(found.values())


@pytest.fixture
def on(monkeypatch):
    def architecture(capability: int):
        monkeypatch.setattr(launch, "_target", lambda device: Target(capability, 2))
        for module in (exact, exact_tiles, tokens):
            monkeypatch.setattr(module, "ROWS", tl.constexpr(16))

    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    return architecture


@pytest.mark.slow
@pytest.mark.parametrize("how", ROUTED)
@pytest.mark.parametrize("architecture, operands", differing(""))
def test_one_head(on, architecture, operands, how):
    on(architecture)
    dtype, weight_dtype, H, options, _ = OPERANDS[operands]
    head = peaked_head(N=70, V=300, H=H)
    if options:
        head.bias = torch.randn(300, dtype=torch.float64)
        head.lora = (torch.randn(3, H).double() * 0.1, torch.randn(300, 3).double() * 0.1, 0.7)
    transform = {"softcap": 20.0} if options else {}
    case = Case(head, dtype, ROUTED[how], weight_dtype, **transform)
    coef_entropy = torch.randn(70) if options and how == "exact" else None
    case.check(torch.randn(70), coef_entropy, tolerance=5e-6 if dtype == torch.float32 else 2e-3, roundings=4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ROUTED)
@pytest.mark.parametrize("architecture, operands", differing("divergence"))
def test_two_heads(on, architecture, operands, how):
    on(architecture)
    dtype, _, H, options, _ = OPERANDS[operands]
    kind = "jsd" if options else "forward_kl"
    options = {"bias": True, "rank": 3, "transform": LogitTransform(softcap=20.0)} if options else {}
    sizes = {"N": 70, "V": 300, "H": H, "ref_H": H + 16}
    case = triton_divergence_case.Case(kind, dtype=dtype, routed=ROUTED[how], **sizes, **options)
    case.check(case.upstream(entropy=how == "exact"), roundings=4)
