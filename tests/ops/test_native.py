"""The seam between the languages: fields by name, what may become a pointer, and what both sides must know alike."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastdpo import distributed, losses, routing
from fastdpo.ops import engines, native
from fastdpo.ops.preference import templates
from fastdpo.ops.selective import operators as selective

C = native.EXTENSION
if C is None:
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)

double = {"dtype": torch.float64}


def fields(**changes) -> dict:
    """Of `sum_blocks`, whose struct has a matrix, a pointer and a number."""
    given = {"block_lse": torch.zeros(3, 4, dtype=torch.float64), "rest_lse": torch.zeros(3, dtype=torch.float64)}
    return {**given, "num_threads": 1, **changes}


def test_constants_that_two_languages_share():
    assert C.BLOCK == routing.BLOCK and C.ONE == routing.ONE
    assert tuple(C.ROW_STATS) == distributed.ROW_STATS and len(C.ROW_STATS) == C.ROW_STATS_SIZE == len(C.NO_ROW_STATS)
    assert C.LEFT_OUT == selective.LEFT_OUT and C.MAX_TERMS == losses.MAX_TERMS
    native_losses = {name for name in losses.LOSSES if name != "sft" and not losses.LOSSES[name].ranked}
    assert C.PREFERENCE_LOSSES.keys() == native_losses
    assert C.DIVERGENCES.keys() == set(losses.F_DIVERGENCES)
    assert set(C.PREFERENCE_OPTIONS) <= set(losses.PREFERENCE_OPTIONS)
    assert templates.SUMS_BYTES == C.PAIR_SUMS_BYTES
    triton = pytest.importorskip("triton")
    if engines.release(triton.__version__) < engines.TRITON_VERSIONS[0]:
        pytest.skip(f"no kernel here is compiled with Triton {triton.__version__}")
    from fastdpo.ops.triton import common, route

    assert (common.BLOCK.value, route.ONE.value) == (C.BLOCK, C.ONE)


def test_every_field_by_its_name():
    given = fields()
    C.sum_blocks(**given)
    torch.testing.assert_close(given["rest_lse"], torch.full((3,), 4.0).double().log())
    with pytest.raises(TypeError, match="sum_blocks has no field 'threads'"):
        C.sum_blocks(**given, threads=1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        C.sum_blocks(*given.values())
    for name in given:
        with pytest.raises(TypeError, match=f"sum_blocks: {name} is missing"):
            C.sum_blocks(**{other: x for other, x in given.items() if other != name})
    with pytest.raises(TypeError, match="rest_lse is None"):
        C.sum_blocks(**fields(rest_lse=None))
    with pytest.raises(TypeError, match="num_threads cannot be 'one'"):
        C.sum_blocks(**fields(num_threads="one"))
    with pytest.raises(TypeError, match="block_lse must have two dimensions"):
        C.sum_blocks(**fields(block_lse=torch.zeros(3, dtype=torch.float64)))


@pytest.mark.parametrize("strange", [5, [1.0], "block_lse"])
def test_what_is_no_tensor_is_named(strange):
    for name in ("block_lse", "rest_lse"):
        with pytest.raises(TypeError, match=f"sum_blocks: {name} cannot be "):
            C.sum_blocks(**fields(**{name: strange}))


def test_a_wrong_type_beside_released_memory_is_an_error():
    """Which no message may print."""
    released = torch.ones(3, dtype=torch.float64)
    released.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="sum_blocks: num_threads cannot be a Tensor"):
        C.sum_blocks(**fields(num_threads=released))
    for is_double in ("x", 1.5, released):
        with pytest.raises(TypeError, match="host_preference_forward: is_double cannot be "):
            C.host_preference_forward(is_double=is_double, logps=(released, released))


def test_a_flag_is_no_number():
    with pytest.raises(TypeError, match="host_preference_backward: average cannot be None"):
        names = ("num_pairs", "num_tokens", "ignore_index")
        C.host_preference_backward(is_double=False, **dict.fromkeys(names, 0), ref_per_token=True, average=None)


def test_matrices_have_the_columns_that_are_read():
    logits, label = torch.randn(2, 300), {"labels": torch.tensor([1, 299]), "label_logit": torch.zeros(2)}
    given = {"data": logits, "col_start": 0, "bias": None, "transform": (1.0, 0.0, 1.0), "stats": None, **label}
    C.fold(**given, block_lse=torch.zeros(2, 3, **double), num_threads=1)
    with pytest.raises(RuntimeError, match=r"fold: block_lse: .* would misread"):
        C.fold(**given, block_lse=torch.zeros(2, 2, **double), num_threads=1)
    pairs = {"coef": torch.ones(2), "first_token": 0, "last_token": 2, "first_block": 0, "num_threads": 1}
    counts = torch.zeros(9, dtype=torch.int64)
    C.count_pairs(bitmap=torch.full((2, 2), 1, dtype=torch.uint8), num_blocks=9, counts=counts, **pairs)
    assert counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 2]
    with pytest.raises(RuntimeError, match=r"count_pairs: bitmap: .* would misread"):
        C.count_pairs(bitmap=torch.zeros(2, 1, dtype=torch.uint8), num_blocks=9, counts=counts, **pairs)


def test_nothing_is_written_outside_of_the_blocks_asked_for():
    bitmap = torch.full((3, 16), 0x55, dtype=torch.uint8)
    rows = {"labels": torch.zeros(3, dtype=torch.int64), "most_pairs": torch.zeros(3, dtype=torch.int32)}
    block_lse, rest_lse = torch.zeros(3, 4, **double), torch.full((3,), 1.4, **double)
    given = {"block_lse": block_lse, "rest_lse": rest_lse, "first_row": 0, "tau": 0.5, "second_tau": -1.0, "seed": 1}
    C.route(**given, **rows, before=None, sums=None, bitmap=bitmap[:, 4:5], num_threads=1)
    assert (bitmap[:, :4] == 0x55).all() and (bitmap[:, 5:] == 0x55).all() and (bitmap[:, 4] < 16).all()
    counts, bits = torch.full((8,), -1), torch.tensor([[0, 0xFF]] * 4, dtype=torch.uint8)
    pairs = {"bitmap": bits, "coef": torch.tensor([1.0, 0.0, 2.0, 1.0]), "first_block": 6, "num_threads": 1}
    C.count_pairs(**pairs, first_token=0, last_token=4, num_blocks=5, counts=counts)
    assert counts.tolist() == [0, 0, 3, 3, 3, -1, -1, -1]
    C.count_pairs(**pairs, first_token=1, last_token=3, num_blocks=5, counts=counts)
    assert counts.tolist() == [0, 0, 1, 1, 1, -1, -1, -1]


ROWS = {
    **{"data": torch.zeros(2, 128), "col_start": 0, "bias": None, "transform": (1.0, 0.0, 1.0), "num_threads": 1},
    **{"labels": torch.zeros(2, dtype=torch.int64), "lse": torch.zeros(2), "logps": torch.zeros(2)},
    **{"coef": torch.ones(2), "entropy": None, "coef_entropy": None, "coef_lse": None},
}
TILE = {
    **{"data": torch.zeros(2, 128), "first_block": 0, "num_blocks": 1, "first_token": 0, "vocab_size": 128},
    **{"blocks": torch.tensor([0], dtype=torch.int32), "offsets": torch.tensor([0, 2])},
    **{"tokens": torch.tensor([0, 1], dtype=torch.int32), "num_threads": 1},
}
PAIRS = {
    **{name: x for name, x in ROWS.items() if name != "col_start"},
    **TILE,
    **{"tau": 0.1, "second_tau": 0.5, "second_bits": None, "hidden_set": 0, "weight_set": 0, "dz_hidden": None},
    **{"hidden_weight": torch.zeros(2), "columns_weight": torch.zeros(2)},
}
PRODUCTS = {
    **TILE,
    **{"hidden": torch.zeros(2, 8), "weight": torch.zeros(128, 8), "source_rows": None, "rounded": 0},
    **{"low_rank": None, "low_rank_first": 0, "lora_b": None, "rank": 0, "product": 0},
}
OUTPUTS = {
    **{"num_rows": 2, "vocab_size": 9, "rest_lse": torch.zeros(2, **double), "label_logit": torch.zeros(2)},
    **{"stats": None, "logps": torch.zeros(2), "lse": torch.zeros(2), "entropy": None, "mean_logit": None},
    **{"is_top1": None, "log_sum_sq_probs": None, "num_threads": 1},
}
APART = [
    ("grad", {**ROWS, "tokens": None}, {"coef_entropy": torch.ones(2)}, "entropy and coef_entropy go together"),
    ("finish", OUTPUTS, {"mean_logit": torch.zeros(2)}, "a statistic needs stats"),
    ("routed_grad", PAIRS, {"tokens": None}, "blocks, offsets and tokens go together"),
    ("routed_grad", PAIRS, {"tokens": None, "blocks": None, "offsets": None}, "tokens of blocks are needed"),
    ("routed_grad", PAIRS, {"weight_set": 1}, "set 1 with its second_bits"),
    ("routed_grad", PAIRS, {"hidden_set": -1, "weight_set": -1}, "set 0 is needed"),
    ("routed_grad", PAIRS, {"weight_set": -1, "dz_hidden": torch.zeros(2, 128)}, "dz_hidden is of two sets"),
    ("products", PRODUCTS, {"data": torch.zeros(2, 127)}, "too narrow for its blocks"),
    ("products", PRODUCTS, {"offsets": torch.tensor([0, 3])}, "offsets must ascend, and be of rows"),
    ("products", PRODUCTS, {"vocab_size": 129}, "weight has fewer rows than the vocabulary"),
    ("products", PRODUCTS, {"low_rank": torch.zeros(2, 1)}, "low_rank and lora_b go together"),
]


@pytest.mark.parametrize("function,given,changes,why", APART, ids=str)
def test_fields_that_do_not_go_together(function, given, changes, why):
    getattr(C, function)(**given)
    with pytest.raises((TypeError, ValueError), match=f"{function}: .*{why}"):
        getattr(C, function)(**{**given, **changes})


def test_both_sides_of_a_batch_lie_alike():
    labels = torch.zeros(4, 3, dtype=torch.int64)
    given = {"num_pairs": 2, "num_tokens": 3, "ignore_index": -100, "ref_per_token": True, "average": False}
    for sides in ((labels[:2], labels[::2]), (labels[:2], None)):
        with pytest.raises(TypeError, match="both sides must be given, with one stride"):
            C.host_preference_backward(
                is_double=False, **given, ld_alpha=-1.0, sft_weight=0.0, offsets=None, labels=sides
            )


def test_arrays_that_tokens_index_have_one_length():
    tokens = torch.tensor([2, 0], dtype=torch.int32)
    given = {"data": torch.randn(2, 128), "col_start": 0, "bias": None, "transform": (1.0, 0.0, 1.0), "tokens": tokens}
    per_token = {name: torch.zeros(3) for name in ("lse", "logps", "coef")}
    rest = {
        "labels": torch.zeros(3, dtype=torch.int64),
        "entropy": None,
        "coef_entropy": None,
        "coef_lse": None,
        "num_threads": 1,
    }
    C.grad(**given, **per_token, **rest)
    for name in per_token:
        with pytest.raises(RuntimeError, match=rf"grad: {name}: .* would misread"):
            C.grad(**given, **{**per_token, name: torch.zeros(2)}, **rest)


@pytest.mark.skipif(not hasattr(C, "cuda_logits_forward"), reason="built without CUDA kernels")
def test_a_gpu_gets_no_pointer_to_other_memory():
    with pytest.raises(RuntimeError, match="cuda_logits_forward: logits: native code for cuda would misread"):
        C.cuda_logits_forward(device=0, stream=0, logits=torch.zeros(2, 3))


def released(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


class Wrapper(torch.Tensor):
    """Values elsewhere: its own storage is none."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __torch_dispatch__(self, *_):
        raise NotImplementedError


MISREAD = {
    "released": {"rest_lse": released(torch.ones(3, **double))},
    "elsewhere": {"rest_lse": torch.ones(3, device="meta", **double)},
    "strided": {"rest_lse": torch.ones(6, **double)[::2]},
    "negated": {"rest_lse": torch._neg_view(torch.ones(3, **double))},
    "of another type": {"rest_lse": torch.ones(3)},
    "too short": {"rest_lse": torch.ones(2, **double)},
    "columns apart": {"block_lse": torch.ones(3, 8, **double)[:, ::2]},
    "wrapper": {"rest_lse": Wrapper(torch.ones(3, **double))},
}


@pytest.mark.parametrize("kind", MISREAD)
def test_no_pointer_to_what_would_be_misread(kind):
    (name,) = MISREAD[kind]
    with pytest.raises(RuntimeError, match=f"sum_blocks: {name}: native code for cpu would misread"):
        C.sum_blocks(**fields(**MISREAD[kind]))


def test_rows_may_be_apart():
    wide, given = torch.randn(3, 9, **double), fields()
    C.sum_blocks(**{**given, "block_lse": wide[:, 2:6]})
    torch.testing.assert_close(given["rest_lse"], wide[:, 2:6].logsumexp(1))
    C.sum_blocks(**fields(block_lse=torch.empty(0, 4, **double), rest_lse=torch.empty(0, **double)))


def test_a_launch_that_fails_says_what_and_why(monkeypatch):
    stub = SimpleNamespace(cuda_a_kernel=lambda **fields: 9, cuda_error_text=lambda error: f"text of {error}")
    monkeypatch.setattr(native, "EXTENSION", stub)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match=r"cuda_a_kernel on cuda:0, of x: CUDA error 9, text of 9"):
        native.launch("cuda_a_kernel", torch.device("cuda:0"), what=", of x", x=1)


@pytest.mark.parametrize(
    "built_with, driver, capability, why",
    [
        (12080, 0, None, "no NVIDIA driver here"),
        (13000, 12080, None, "built with CUDA 13.0; the driver serves 12.8"),
        (12080, 12040, None, None),  # an older driver of the same major version
        (12080, 13000, (8, 6), None),
        (12080, 13000, (10, 3), None),  # by PTX
        (12080, 13000, (7, 5), "built for sm_80, sm_90; this GPU is (7, 5)"),
    ],
)
def test_why_the_cuda_kernels_cannot_run(monkeypatch, built_with, driver, capability, why):
    stub = SimpleNamespace(
        cuda_logits_forward=None, cuda_runtime_version=lambda: built_with, cuda_driver_version=lambda: driver
    )
    monkeypatch.setattr(native, "EXTENSION", stub)
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": [80, 90], "cuda_ptx": [100]})
    assert native.cuda_problem.__wrapped__(capability) == why


def test_an_installation_without_kernels_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_reason": "no nvcc"})
    monkeypatch.setattr(native, "EXTENSION", SimpleNamespace())
    assert native.cuda_problem.__wrapped__() == "built without CUDA kernels: no nvcc"
    monkeypatch.setattr(native, "EXTENSION", None)
    monkeypatch.setattr(native, "REASON", "no C++ compiler")
    assert native.cuda_problem.__wrapped__() == "the native extension is missing (no C++ compiler)"


def test_a_tokens_draw_takes_64_bits_of_its_place_and_of_the_seed():
    """Places no batch of a test has: as the oracle in Python draws."""
    generator, first, seed = torch.Generator().manual_seed(4), 2**40 + 2**32 - 3, 2**63 + 5
    share = torch.rand(6, 40, generator=generator) * 0.02
    labels = torch.zeros(6, dtype=torch.int64)
    expected, _ = routing.route(share, labels, (0.02,), seed, torch.arange(first, first + 6))
    bitmap, most_pairs = torch.empty(6, 5, dtype=torch.uint8), torch.empty(6, dtype=torch.int32)
    given = {"block_lse": share.double().log(), "rest_lse": torch.zeros(6, **double), "labels": labels}
    drawn = {"first_row": first, "seed": seed, "tau": 0.02, "second_tau": -1.0, "before": None, "sums": None}
    C.route(**given, **drawn, bitmap=bitmap, most_pairs=most_pairs, num_threads=1)
    assert torch.equal(bitmap, expected) and 0 < bitmap.ne(0).sum()
