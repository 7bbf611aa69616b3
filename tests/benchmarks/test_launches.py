"""Launches of real models, without a GPU: what a driver or a card would refuse is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

# In a process of its own: in this one Triton may be its interpreter.
SCRIPT = """
import contextlib, io, json, sys

sys.path.insert(0, sys.argv[1])
import torch, triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.ops.triton import launch
from fastdpo.ops.triton.launch import Tile
from tools import launches
from tools.fake_gpu import FakeGpu
from tools.launches import check, faults_of, record
from tools.offsets import narrow

def tool(*arguments):
    sys.argv = ["launches", "--jobs", "1", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = launches.main()
    return status, " ".join(output.getvalue().split())

small = ["--model", "SmolLM2-135M", "--dtype", "bf16", "--run", "forward"]
fitting = tool(*small, "--arch", "86")
launch._TILES["fold"]["short"][120] = Tile(128, 256, 64, 8, 4)  # 192 KiB: a card of 99 KiB cannot have it
planted = tool(*small, "--arch", "86")
del launch._TILES["fold"]["short"][120]

large, problems, _ = record(["bf16"], ["trained head"], 80, "Command R+")
launches.MOST_FORMS = 3
_, too_many, _ = record(["bf16"], ["frozen head"], 90, "GPT-2")

with FakeGpu(90) as gpu:
    x = gpu.empty(1000, 256, dtype=torch.bfloat16)
    view = gpu.empty(1000, 257, dtype=torch.bfloat16)[:, 1:]
    shifted = view.data_ptr() % 16
    boxes = {
        "right": list(faults_of((1, 1), {"a": TensorDescriptor(x, [1000, 256], [256, 1], [128, 64])})),
        "wide": list(faults_of((1, 1), {"a": TensorDescriptor(x, [1000, 256], [256, 1], [512, 64])})),
        "grid": list(faults_of((1, 70000), {})),
    }

@triton.jit
def in_64_bits(a, out, H, step: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, step)
    tl.store(out + i, tl.load(a + row.to(tl.int64) * H + i))

@triton.jit
def in_32_bits(a, out, H, step: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, step)
    at = row * H
    for k in range(0, H, step):
        tl.store(out + i, tl.load(a + at + i))
        at += step

def offsets(kernel):
    source = ASTSource(kernel, {"a": "*bf16", "out": "*bf16", "H": "i32", "step": "constexpr"}, {(3,): 128})
    return sorted(narrow(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]))

print(json.dumps({
    "fitting": fitting, "planted": planted, "too many": too_many, "problems": problems,
    "large": sorted({name for form in large for name in form.large}),
    "long and narrow": sorted({name for form in large if form.variant.name in ("compact", "gather", "fold")
                               for name in form.large & set(check([form])[0][1].narrow)}),
    "boxes": boxes, "shifted": shifted, "64": offsets(in_64_bits), "32": offsets(in_32_bits),
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path_factory.mktemp("script") / "script.py"
    file.write_text(SCRIPT)
    command = [sys.executable, file, str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_that_fits_has_no_fault(found):
    status, output = found["fitting"]
    assert status == 0, output
    assert "0 faults" in output and "fold" in output and "FAULT" not in output


def test_a_tile_that_does_not_fit_the_card_fails(found):
    status, output = found["planted"]
    assert status == 1
    assert re.search(r"1\d\d KiB of shared memory; a program has 99", output) and "SmolLM2-135M" in output


def test_a_model_with_too_many_forms_fails(found):
    assert len(found["too many"]) == 1 and "3 at most" in found["too many"][0]


def test_more_than_2_31_elements_are_seen_at_the_head_and_moved_in_64_bits(found):
    assert "weight" in found["large"] and found["problems"] == []
    assert found["long and narrow"] == []
    assert found["64"] == [] and found["32"] == ["a"]


def test_what_tma_and_a_driver_refuse(found):
    assert found["boxes"]["right"] == []
    assert "a box of [512, 64] elements" in found["boxes"]["wide"][0]
    assert "70000 programs" in found["boxes"]["grid"][0]
    assert found["shifted"] == 2  # an address follows a view
