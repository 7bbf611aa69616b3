"""Dense products, by whichever library, and how many rows they are for."""

from __future__ import annotations

import time

import pytest
import torch
from heads import peaked_head, relative_error

import fastdpo
from fastdpo.ops import native
from fastdpo.ops.cpu import backward as cpu_backward
from fastdpo.ops.cpu import library

if not native.available():
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)


@pytest.fixture(params=[False, True], ids=["torch.mm", "oneDNN"])
def either(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(library, "USES_ONEDNN", request.param)


def test_products_in_any_layout(either):
    a, b = torch.randn(7, 40)[:, ::2], torch.randn(20, 11).T
    expected = a.double() @ b.double().T
    for out in (torch.full((7, 11), torch.nan), torch.full((7, 30), torch.nan)[:, 3:14]):
        library.matmul(a, b, out)
        torch.testing.assert_close(out, expected.float())
        library.add_matmul(a, b, out)
        torch.testing.assert_close(out, 2 * expected.float())


LAYOUTS = {
    "rows": lambda n, k: torch.randn(n, k),
    "columns": lambda n, k: torch.randn(k, n).T,
    "rows apart": lambda n, k: torch.randn(n, k + 16)[:, :k],
    "columns apart": lambda n, k: torch.randn(k, n + 16)[:, :n].T,
    "every other": lambda n, k: torch.randn(n, 2 * k)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_multiplied_number_by_number(either, layout):
    """oneDNN takes 1,000 times as long for what none of its kernels reads, and says nothing."""
    plain, seconds = torch.randn(64, 512), {"plain": [], "laid out": []}
    a, b, out = LAYOUTS[layout](96, 512), LAYOUTS[layout](64, 512), torch.empty(96, 64)
    multiply = {"plain": lambda: torch.mm(a, plain.T), "laid out": lambda: library.matmul(a, b, out)}
    for _ in range(5):
        for name, of_layout in multiply.items():
            start = time.perf_counter()
            of_layout()
            seconds[name].append(time.perf_counter() - start)
    assert min(seconds["laid out"]) < 50 * min(seconds["plain"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_oneDNN_is_handed_what_its_kernels_read(monkeypatch, layout, dtype):
    """By every product of a forward and a backward, of heads in any layout and type."""
    handed, product = [], torch.ops.mkldnn._linear_pointwise

    def observed(a, b, *rest):
        handed.append(b.is_contiguous() or b.T.is_contiguous())
        return product(a, b, *rest)

    monkeypatch.setattr(library, "USES_ONEDNN", True)
    monkeypatch.setattr(library, "USES_BF16", False)
    monkeypatch.setattr(library, "OWN_BF16", False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", observed)
    hidden, weight = (LAYOUTS[layout](n, 40).to(dtype).requires_grad_() for n in (100, 300))
    logps = fastdpo.linear_logps(hidden, weight, torch.arange(100), backward="exact")
    logps.sum().backward()
    assert len(handed) >= 3 and all(handed)


@pytest.mark.skipif(not library.has_bf16(), reason="this torch has no such MKL")
@pytest.mark.parametrize("k", [0, 1, 40])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_products_of_bf16_have_fp32_sums_in_any_layout(turned, k):
    def matrix(rows: int, across: bool) -> torch.Tensor:
        made = torch.randn(k, rows + 3)[:, :rows].T if across else torch.randn(rows, 2 * k + 1)[:, :k]
        return made.bfloat16() if k % 2 else made.bfloat16()[:, torch.arange(k)]

    for n, m in ((7, 11), (1, 11), (7, 1), (0, 3)):
        a, b = matrix(n, turned[0]), matrix(m, turned[1])
        expected = (a.double() @ b.double().T).float()
        for out in (torch.full((n, m), torch.nan), torch.full((n, m + 9), torch.nan)[:, 2 : m + 2]):
            library.matmul(a, b, out)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)
            library.add_matmul(a, b, out)
            torch.testing.assert_close(out, 2 * expected, rtol=1e-6, atol=2e-5)
    strange = torch.randn(22, 14).bfloat16()[::2, ::2]
    out = torch.empty(11, 11)
    library.matmul(strange, strange, out)
    torch.testing.assert_close(out, strange.float() @ strange.float().T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="out must be fp32 with its columns side by side"):
        library.matmul(strange, strange, torch.empty(11, 11).T)


BF16 = {"dtype": torch.bfloat16}
PRODUCT = {
    **{"a": torch.zeros(2, 8, **BF16), "b": torch.zeros(3, 8, **BF16), "out": torch.zeros(2, 3)},
    **{"a_turned": False, "b_turned": False, "add": False},
}
MISFITS = [
    ({"b": torch.zeros(3, 7, **BF16)}, "sums of different lengths"),
    ({"b_turned": True}, "sums of different lengths"),
    ({"a": torch.zeros(2, 8, dtype=torch.float16)}, "must be bf16"),
    ({"b": torch.zeros(3, 8)}, "must be bf16"),
    ({"out": torch.zeros(2, 4)}, "another shape than the product"),
    ({"out": torch.zeros(3, 3)}, "another shape than the product"),
    ({"a": torch.zeros(8, **BF16).expand(2, 8)}, "overlap"),
    ({"out": torch.zeros(4).as_strided((2, 3), (1, 1))}, "overlap"),
]


@pytest.mark.parametrize("changes,why", MISFITS, ids=[str(i) for i in range(len(MISFITS))])
def test_what_does_not_go_together_never_reaches_the_library(changes, why):
    with pytest.raises(TypeError, match=f"bf16_product: .*{why}"):
        native.EXTENSION.bf16_product(**{**PRODUCT, **changes})


@pytest.mark.parametrize("by_library", [False, True], ids=["csrc", "library"])
@pytest.mark.parametrize("tau", ["exact", 0.0, (0.0, 1e-9)])
@pytest.mark.parametrize("hidden_size", [64, 1100])
def test_a_head_in_bf16_units(monkeypatch, hidden_size, tau, by_library):
    """As on a processor that has them: log-probs within 1e-4 nats per 512 tokens, gradients within 2e-3."""
    if by_library and not library.has_bf16():
        pytest.skip("this torch has no such MKL")
    monkeypatch.setattr(library, "USES_BF16", by_library)
    monkeypatch.setattr(library, "OWN_BF16", not by_library)
    monkeypatch.setattr(cpu_backward, "CROSSOVER", 1.0)
    monkeypatch.setattr(cpu_backward, "CROSSOVER_BF16", 1.0)
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    head = peaked_head(N=512 if hidden_size == 64 else 1200, V=3000 if hidden_size == 64 else 520, H=hidden_size)
    leaves, expected = head.leaves(torch.bfloat16), head.rounded(torch.bfloat16)
    options = {"backward": "exact"} if tau == "exact" else {"tau": tau, "seed": 1}
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, **options)
    wanted = expected.logps()
    assert (logps.double().sum() - wanted.sum()).abs() < 1e-4 * len(wanted) / 512
    logps.sum().backward()
    wanted.sum().backward()
    for name, x in leaves.tensors().items():
        gradient = expected.tensors()[name].grad
        assert relative_error(x.grad, gradient) < 2e-3 + relative_error(gradient.bfloat16(), gradient), name


@pytest.mark.parametrize("tau", ["exact", 0.0])
@pytest.mark.parametrize("count", [1, 3, 50, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_has_the_forwards_probabilities(either, monkeypatch, dtype, count, tau):
    """Logits of 1e12 differ by 1e5 nats between two products. Listed rows may be another's than the forward's, and a
    probability of theirs is still at most 1."""
    monkeypatch.setattr(cpu_backward, "CROSSOVER", 1.0)
    monkeypatch.setenv("FASTDPO_ENGINE", "cpu")
    hidden, weight = (torch.randn(count, 33) * 1e12).to(dtype), torch.randn(300, 33).to(dtype)
    labels = torch.randint(300, (count,))
    options = {"backward": "exact"} if tau == "exact" else {"tau": tau, "seed": 1}
    found = [x.clone().requires_grad_() for x in (hidden, weight)]
    fastdpo.linear_logps(*found, labels, **options).sum().backward()
    wanted = [x.double().requires_grad_() for x in (hidden, weight)]
    logps = (wanted[0] @ wanted[1].T).log_softmax(-1)
    logps.gather(1, labels[:, None]).sum().backward()
    for x, expected in zip(found, wanted):
        assert x.grad.isfinite().all()
        if tau == "exact":
            assert relative_error(x.grad, expected.grad) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_few_rows_are_left_to_csrc(either):
    assert [rows for rows in range(200) if not library.takes(rows)] == list(range(4, 96))
    assert [rows for rows in range(200) if not library.adds(rows)] == (list(range(4)) if library.USES_ONEDNN else [])
    assert not any(library.takes(rows, own_bf16=True) for rows in range(200))
    assert all(library.takes(rows, in_bf16=True, own_bf16=True) for rows in range(200))


def test_which_rows_csrc_hands_to_a_library():
    x = torch.zeros(6, 8, **BF16)
    assert library.takes_bf16_rows(x, x[::2], x[:, :5], x[2:, 3:])
    for strange in (x.float(), x.T, x[:, ::2], x[:1].expand(6, 8), x.as_strided((3, 4), (2, 1))):
        assert not library.takes_bf16_rows(x, strange)


@pytest.mark.parametrize(
    "changes", [{"weight": torch.zeros(128, 8)}, {"hidden": torch.zeros(2, 8)}, "overlap", "dense"]
)
def test_csrc_hands_nothing_else_to_a_library(changes):
    if changes == "overlap":
        changes = {"weight": torch.zeros(8, **BF16).expand(128, 8)}
    if changes == "dense":
        changes = {"blocks": None, "offsets": None, "tokens": None}
    fields = {
        **{"data": torch.zeros(2, 128), "first_block": 0, "num_blocks": 1, "first_token": 0, "vocab_size": 128},
        **{"blocks": torch.tensor([0], dtype=torch.int32), "offsets": torch.tensor([0, 2]), "source_rows": None},
        **{"tokens": torch.tensor([0, 1], dtype=torch.int32), "rounded": 1, "low_rank": None, "low_rank_first": 0},
        **{"hidden": torch.ones(2, 8, **BF16), "weight": torch.ones(128, 8, **BF16), "lora_b": None, "rank": 0},
    }
    with pytest.raises(TypeError, match="products: a library's product is of lists and of bf16"):
        native.EXTENSION.products(**{**fields, **changes}, product=2, num_threads=1)
    with pytest.raises(ValueError, match="products: product knows no 3"):
        native.EXTENSION.products(**fields, product=3, num_threads=1)
    with pytest.raises(TypeError, match="a product in bf16 is of factors rounded to it"):
        native.EXTENSION.products(**{**fields, "rounded": 0}, product=1, num_threads=1)
    if library.has_bf16():
        native.EXTENSION.products(**fields, product=2, num_threads=1)
        assert (fields["data"] == 8).all()
