"""The ahead-of-time check of the kernels finds what it is there to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

# In a process of its own: in this one Triton may be its interpreter.
COMPILE = """
import json, os, sys, warnings
from dataclasses import replace
from functools import partial

sys.path.insert(0, sys.argv[1])
import torch
from fastdpo.ops.problem import Head, Rows
from fastdpo.ops.triton import special
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.launch import Recorder, Target
from fastdpo.ops.triton.common import dot
from tools import kernel_code
from tools.kernel_code import code_of, faults
from tools.kernel_variants import variant_of, variants
from tools.kernels import examine

# before anything is compiled, so that no cache takes the changed kernels for ours: products of fp32 off tensor cores
dot._unsafe_update_src(dot.src.replace('"tf32x3"', '"ieee"'))

def with_tma(variant):
    index = list(variant.signature).index("form")
    path = (index, variant.signature["form"]._fields.index("TMA"))
    return replace(variant, constants={**variant.constants, path: True})

def examined(variant, judged_as=None, without=()):
    (code,) = code_of([variant])
    code = replace(code, unused=(*code.unused, *without))
    found = faults(judged_as or variant, code)
    return {
        "faults": found, "tensor core": code.tensor_core(), "registers": code.registers, "spills": code.spills,
        "main loop": sum(code.main_loop.values()),
        "per logit": sum(code.path.epilogue.values()) / code.logits if code.path else None,
    }

def counted(name):
    variant = next(one for one in variants(90, ["bf16"], name) if one.name == name)
    (code,) = code_of([variant])
    spills = sum(n for way in (code.path.epilogue, code.path.start) for one, n in way.items() if one.startswith("LDL"))
    exponentials = code.path.epilogue["MUFU.EX2"]
    return {"per logit": sum(code.path.epilogue.values()) / code.logits, "spills": spills, "loop": code.main_loop,
            "exponentials": exponentials / code.logits}

half, *_ = variants(80, ["bf16"], "fold")
single, *_ = variants(80, ["fp32"], "fold", essential=())
overlapping, *others = variants(90, ["bf16"], "hopper_fold")

broken = replace(half, warps=3)
beside = examine([broken, half, single])
alone = [*code_of([half]), *code_of([single])]

def compared():
    # what the first use of a special kernel compiles for its comparison
    x = torch.zeros(8, 4096, dtype=torch.bfloat16)
    fold = partial(special.load("hopper").fold, form="64x4")
    with Recorder(Target(90, 132)) as launches:
        rows = Rows(torch.zeros(8, dtype=torch.int64), -100, 0, 8)
        special.difference(Call(Head(x, x, compute_dtype=x.dtype), rows), fold, fold)
    return {variant_of(90, function, *rest).key for function, _, *rest in launches}

def fused(options):
    kernel_code.OPTIONS = options
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ptx = kernel_code.compile_variant(half).asm["ptx"]
    return ptx.count("fma.rn.f32"), [str(one.message) for one in said if "FP_FUSION" in str(one.message)]

asked_for = kernel_code.OPTIONS
fusion = {"default off": fused({})[0], "asked for": fused(asked_for)[0]}
del os.environ["TRITON_DEFAULT_FP_FUSION"]
fusion["said"] = fused(asked_for)[1]
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"

print(json.dumps({
    "fusion": fusion,
    "broken": beside[0][2],
    "beside others": [code for _, code, _ in beside[1:]] == alone,
    "as launched": examined(half),
    "fold": counted("fold"),
    "exact": counted("exact"),
    "one warp": examined(replace(half, warps=1)),
    "many stages": examined(replace(half, stages=12)),
    "without tensor cores": examined(single),
    "overlapping": examined(overlapping),
    "the same is compared": compared() == {overlapping.key},
    "its other forms": [examined(one)["faults"] for one in others],
    "unread": examined(half, judged_as=half, without={"weight"}),
    "for another architecture": examined(half, judged_as=with_tma(replace(half, capability=90))),
}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # as in Triton 3.10: nothing here may count on it
    command = [sys.executable, "-c", COMPILE, str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kernel_as_it_is_launched_has_no_fault(compiled):
    assert compiled["as launched"]["faults"] == []
    assert compiled["as launched"]["tensor core"]["HMMA"] > 0
    assert 32 < compiled["as launched"]["registers"] <= 255


def test_forms_are_disassembled_together(compiled):
    """One that does not compile is a fault like others, and takes no other's code."""
    assert len(compiled["broken"]) == 1 and compiled["broken"][0].startswith("does not compile: ")
    assert compiled["beside others"]


def test_fusion_is_asked_for_whatever_the_default(compiled):
    """And so Triton 3.9 does not announce another default. A logit's own multiplication is fused by name."""
    found = compiled["fusion"]
    assert found["asked for"] > found["default off"] >= 128  # a thread's logits
    assert found["said"] == []


def test_the_fold_for_hopper(compiled):
    code = compiled["overlapping"]
    assert code["faults"] == [] and code["spills"] == 0
    assert code["tensor core"] == {"HGMMA": 8}  # both warpgroups' step
    assert code["main loop"] <= 60 and code["per logit"] <= 6
    assert compiled["its other forms"] == [[], []]
    assert compiled["the same is compared"]


@pytest.mark.parametrize(
    "change,fault",
    [
        ("one warp", "spilled"),
        ("many stages", "KiB of shared memory"),
        ("without tensor cores", "without a tensor-core instruction"),
        ("unread", "weight never read"),
        ("for another architecture", "no HGMMA"),
        ("for another architecture", "no TMA instruction"),
    ],
)
def test_a_changed_kernel_has_its_fault(compiled, change, fault):
    assert any(fault in one for one in compiled[change]["faults"]), compiled[change]


@pytest.mark.parametrize("kernel, most", [("fold", 6), ("exact", 8)])
def test_a_common_tile_of_logits_takes_few_instructions_each(compiled, kernel, most):
    found = compiled[kernel]
    assert found["per logit"] <= most and found["spills"] == 0, found
    assert found["exponentials"] < 1.1 and sum(found["loop"].values()) < 120
    assert sum(n for name, n in found["loop"].items() if name.startswith("HGMMA")) == 4


# An outer loop from 0x0040 that begins within the inner one, as ptxas rotates them, and a loop without a product.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00 */
        /*0010*/                   LDL R4, [R1] ;                  /* 0x00 */
        /*0020*/                   LDG.E.128 R8, [R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @!P0 LDL.64 R10, [R1+0x8] ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   LDL R4, [R1+0x10] ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   BRA 0x40 ;
        /*0090*/                   LDL R4, [R1+0x10] ;
        /*00a0*/               @P2 BRA 0x90 ;
        /*00b0*/                   EXIT ;
"""


def test_hot_loops_are_the_innermost_with_a_product():
    from tools.kernel_code import hot_loops, instructions

    code = instructions(LISTING)
    assert [mnemonic for _, mnemonic, _ in code][:3] == ["MOV", "LDL", "LDG.E.128"]
    (loop,) = hot_loops(code)
    assert [address for address, _, _ in loop] == [0x20, 0x30, 0x40, 0x50]
    without_product = [one for one in code if "HMMA" not in one[1]]
    assert {loop[0][0] for loop in hot_loops(without_product)} == {0x20, 0x90}


# A tile's main loop, then a branch: two exponentials behind masks, or without them. The way without any is none, nor is
# the wait out of line, from which the loop goes on.
TILES = """
        /*0000*/                   UMOV UR4, URZ ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!P2 BRA 0x120 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/               @P3 BRA 0xf0 ;
        /*0050*/               @P1 BRA 0xb0 ;
        /*0060*/                   FSEL R4, R4, -INF, P4 ;
        /*0070*/                   FSEL R5, R5, -INF, P5 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/                   BRA 0xd0 ;
        /*00b0*/                   MUFU.EX2 R4, R4 ;
        /*00c0*/                   MUFU.EX2 R5, R5 ;
        /*00d0*/                   LDL R6, [R1] ;
        /*00e0*/                   BRA 0x0 ;
        /*00f0*/                   FADD R6, R4, R5 ;
        /*0100*/                   BRA 0x0 ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x30 ;
"""


def test_the_way_of_a_common_tile():
    from tools.code_paths import tile_path
    from tools.kernel_code import hot_loops, instructions

    code = instructions(TILES)
    (loop,) = hot_loops(code)
    path = tile_path(code, loop, 2)
    assert path.epilogue == {"BRA": 3, "MUFU.EX2": 2, "LDL": 1} and path.start == {"UMOV": 1}
    assert tile_path(code, loop, 0).epilogue == {"BRA": 1}  # of the wait
    assert tile_path(code, loop, 3) is None


def test_tensors_that_a_kernel_does_not_use():
    from tools.offsets import unused

    head = "tt.func public @k(%hidden: !tt.ptr<f32>, %weight: !tt.tensordesc<tensor<64x32xf32>>, %weight_0: i32) {"
    body = "  %a = tt.splat %hidden : !tt.ptr<f32>\n  %b = tt.descriptor_load %weight[%c0, %weight_0]\n}"
    assert unused(f"{head}\n{body}") == set()
    assert unused(f"{head}\n{body.replace('%weight[', '%other[')}") == {"weight"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_kernels_of_another_commit(monkeypatch):
    """Which stand before this one's in the other process."""
    from tools import kernels

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = ["--arch", "80", "--kernel", "finish", "--dtype", "bf16", "--problem", "exact", "--revision", ""]
    assert kernels.of_revision("HEAD", asked) == 0


def test_commits_before_launches_asked_for_fusion():
    without = "from fastdpo.ops.triton import launch; del launch.OPTIONS; from tools import kernel_code as code; "
    command = [sys.executable, "-c", without + "assert code.OPTIONS == {'enable_fp_fusion': True}"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("option, value", [("--kernel", "no such kernel"), ("--problem", "no such problem")])
def test_a_check_of_nothing_fails(monkeypatch, option, value):
    from tools import kernels

    monkeypatch.setattr(sys, "argv", ["kernels", "--arch", "80", "--dtype", "bf16", option, value])
    with pytest.raises(SystemExit) as ended:
        sys.exit(kernels.main())
    assert ended.value.code != 0


# A CUDA kernel's loop over whole vectors, then one over single elements.
USAGE = """
 Function _ZN7fastdpo41_GLOBAL__N__1_9_logits_cu_c1522logits_backward_kernelINS_8BFloat16ELb0EEEvNS_4ArgsE:
  REG:40 STACK:0 SHARED:128 LOCAL:0 CONSTANT[0]:440 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CUDA_LISTING = """
		Function : _ZN7fastdpo41_GLOBAL__N__1_9_logits_cu_c1522logits_backward_kernelINS_8BFloat16ELb0EEEvNS_4ArgsE
        /*0010*/                   LDG.E.EF.128 R8, [R2.64] ;
        /*0020*/                   STG.E.EF.128 [R2.64], R8 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   LDG.E.U16 R8, [R2.64] ;
        /*0050*/                   STG.E.U16 [R2.64], R8 ;
        /*0060*/              @!P0 BRA 0x40 ;
"""


@pytest.mark.parametrize(
    "old,new,fault",
    [
        ("", "", None),
        ("STG.E.EF.128", "STG.E.EF.64", "1 loads but 0 stores of 16 bytes"),
        ("LDG.E.EF.128", "LDG.E.EF.64", "no loop with 16-byte loads"),
        ("LDG.E.U16 R8, [R2.64]", "LDL R8, [R1]", "local memory: 0 bytes, 1 accesses"),
        ("STACK:0", "STACK:16", "local memory: 16 bytes"),
    ],
)
def test_faults_of_a_cuda_kernel(old, new, fault):
    from tools.cuda_kernels import faults, kernels_in

    (kernel,) = kernels_in(CUDA_LISTING.replace(old, new), USAGE.replace(old, new))
    assert (kernel.name, kernel.type, kernel.registers) == ("logits_backward_kernel", "bf16", 40)
    found = faults(kernel)
    assert fault in found[0] if fault else found == []


def test_names_of_cuda_kernels():
    from tools.cuda_kernels import faults, kernels_in

    def renamed(text, name):
        return text.replace("22logits_backward_kernelINS_8BFloat16ELb0EEE", name)

    for mangled, name, kind in [
        ("21logits_forward_kernelIfLb1EEE", "logits_forward_kernel, entropy", "fp32"),
        ("20logits_finish_kernelINS_7Float16ELb0EEE", "logits_finish_kernel", "fp16"),
    ]:
        listing = renamed(CUDA_LISTING, mangled).replace(".128", ".64")
        (kernel,) = kernels_in(listing, renamed(USAGE, mangled))
        assert (kernel.name, kernel.type) == (name, kind)
        assert bool(faults(kernel)) == ("finish" not in name)  # which has no loop over a row
