"""A token has the same bits alone as in any batch: on a GPU always, on the CPU under deterministic algorithms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from heads import SmallHead, small_head
from interpreter import interpreter_problem
from layouts import quick_interpreter
from torch import Tensor

import fastdpo
from fastdpo.ops.cpu import operands

INTERPRETED = not torch.cuda.is_available()
N, V, H = 300, 700, 330  # H: more than one of csrc's sums; V: several blocks, the last one not whole
SIZES = (1, 2, 3, 5, 95, 96, 130, N - 1)  # on both sides of where libraries and csrc take turns, and of tiles
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "low rank": {"lora": True},
}
TRANSFORMS = {
    "plain": {},
    "scaled": {"logit_scale": 1.7, "temperature": 0.6},
    "negative": {"logit_scale": -0.7},
    "capped": {"logit_scale": 0.8, "softcap": 5.0, "temperature": 1.3},
}


@pytest.fixture(params=["cpu", "triton"])
def invariant_engine(request, monkeypatch) -> Iterator[str]:
    reason = fastdpo.backends()["engines"][request.param]["reason"]
    reason = reason or (interpreter_problem() if request.param == "triton" else None)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTDPO_ENGINE", request.param)
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param == "cpu")
    torch.set_default_device("cuda" if request.param == "triton" and not INTERPRETED else None)
    yield request.param
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


def rows_of(head: SmallHead, rows: Tensor) -> SmallHead:
    return SmallHead(head.hidden[rows], head.weight, head.labels[rows], head.bias, head.lora)


def stats_of(head: SmallHead, **options) -> dict[str, Tensor]:
    with torch.no_grad():
        found = fastdpo.linear_token_stats(head.hidden, head.weight, head.labels, head.bias, lora=head.lora, **options)
    return found._asdict()


def assert_same_bits(part: dict[str, Tensor], whole: dict[str, Tensor], rows: Tensor) -> None:
    for name, x in part.items():
        assert torch.equal(x, whole[name][rows]), f"{name} of {len(rows)} tokens"


OF_CPU = [*itertools.product(HEADS, TRANSFORMS, [torch.float32, torch.bfloat16, torch.float16])]
# What a kernel is compiled for, and each of what it takes as numbers; the interpreter has no products of bf16.
FEW = [("plain", name, torch.float32) for name in TRANSFORMS]
FEW += [("low rank", "capped", torch.float32), ("bias", "scaled", torch.float16)]
CASES = [("cpu", *case) for case in OF_CPU] + [("triton", *case) for case in (FEW if INTERPRETED else OF_CPU)]


@pytest.mark.parametrize("invariant_engine,kind,transform,dtype", CASES, ids=str, indirect=["invariant_engine"])
def test_a_token_does_not_see_its_neighbours(invariant_engine, kind, transform, dtype):
    few = invariant_engine == "triton" and INTERPRETED
    n, sizes = (140, (2, 130)) if few else (N, SIZES)
    head = small_head(n, V, 48 if few else H, **HEADS[kind]).leaves(dtype, False)
    with quick_interpreter(invariant_engine):
        whole = stats_of(head, **TRANSFORMS[transform])
        for size in sizes:
            rows = torch.randperm(n)[:size]
            torch.set_num_threads(1 + size % 2)
            assert_same_bits(stats_of(rows_of(head, rows), **TRANSFORMS[transform]), whole, rows)


def test_labels_of_neighbours_decide_no_bit(invariant_engine):
    """A tile without a label of its rows goes another way than one with."""
    head = small_head(64, V, 48).leaves(torch.float32, False)
    options = {"logit_scale": 1.7, "temperature": 0.6}
    first = torch.tensor([0])
    with quick_interpreter(invariant_engine):
        alone = stats_of(rows_of(head, first), **options)
        for block in range(0, V, 128):
            head.labels[1:] = torch.randint(block, min(block + 128, V), (63,))
            assert_same_bits(alone, stats_of(head, **options), first)


def test_positions_and_masked_rows_decide_no_bit(invariant_engine):
    head = small_head(140, V, 48, bias=True).leaves(torch.float32, False)
    with quick_interpreter(invariant_engine):
        whole = stats_of(head)
        for kept in (0.9, 0.1):
            labels = torch.where(torch.rand(140) < kept, head.labels, -100)
            rows = (labels != -100).nonzero()[:, 0]
            masked = SmallHead(head.hidden, head.weight, labels, head.bias)
            found = {name: x[rows] for name, x in stats_of(masked).items()}
            assert_same_bits(found, whole, rows)


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("tile_bytes", [None, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_does_its_exact_gradient_on_the_cpu(monkeypatch, deterministic, tile_bytes, dtype):
    """Of hidden: a tile's width hangs on how many rows it has, but not which columns are added at once."""
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    if tile_bytes is not None:
        monkeypatch.setattr(operands, "TILE_BYTES", tile_bytes)
    head = small_head(N, 3000, 20, bias=True, lora=True)
    coef = torch.randn(N)

    def gradient(rows: Tensor) -> Tensor:
        leaves = rows_of(head, rows).leaves(dtype)
        logps = fastdpo.linear_logps(
            leaves.hidden, leaves.weight, leaves.labels, leaves.bias, lora=leaves.lora, backward="exact"
        )
        logps.backward(coef[rows])
        return leaves.hidden.grad

    whole = gradient(torch.arange(N))
    for size in SIZES:
        rows = torch.randperm(N)[:size]
        assert torch.equal(gradient(rows), whole[rows]), size


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_nor_does_its_divergence_on_the_cpu(monkeypatch, deterministic, kind):
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    hidden, weight, labels = torch.randn(N, 300), torch.randn(V, 300) * 0.1, torch.randint(V, (N,))
    teacher = torch.randn(N, 40), torch.randn(V, 40) * 0.3

    def divergence(rows: Tensor) -> Tensor:
        given = hidden[rows], weight, teacher[0][rows], teacher[1], labels[rows]
        return fastdpo.linear_divergence(*given, kind=kind, backward="exact").divergence

    whole = divergence(torch.arange(N))
    for size in SIZES:
        rows = torch.randperm(N)[:size]
        assert torch.equal(divergence(rows), whole[rows]), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_from_logits_never_does(dtype):
    logits, index = torch.randn(N, 1003).to(dtype), torch.randint(1003, (N,))
    whole = fastdpo.selective_log_softmax(logits, index)
    for size in SIZES:
        rows = torch.randperm(N)[:size]
        assert torch.equal(fastdpo.selective_log_softmax(logits[rows], index[rows]), whole[rows]), size


def test_deterministic_algorithms_change_no_more_than_rounding(monkeypatch, deterministic):
    """Forward and backward under different settings fit together."""
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    results = []
    for forward, backward in ((True, True), (True, False), (False, True), (False, False)):
        leaves = small_head_again(512, 700, 64).leaves(torch.float32)
        torch.use_deterministic_algorithms(forward)
        logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, backward="exact")
        torch.use_deterministic_algorithms(backward)
        logps.sum().backward()
        results.append((logps.detach(), leaves.hidden.grad, leaves.weight.grad))
    for other in results[1:]:
        for x, y in zip(results[0], other):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def small_head_again(*shape: int) -> SmallHead:
    torch.manual_seed(7)
    return small_head(*shape)
