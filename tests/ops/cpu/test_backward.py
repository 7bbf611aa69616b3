"""The CPU engine's backward, in ranges and tiles of every size, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head

from fastdpo.head import LogitTransform, LoRA, Routing
from fastdpo.ops import native, reference
from fastdpo.ops.cpu import backward as cpu_backward
from fastdpo.ops.cpu import library, operands
from fastdpo.ops.cpu.forward import forward
from fastdpo.ops.problem import Head, Needs, Tokens, Upstream

if not native.available():
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)

EVERYTHING = Needs(True, True, True, True, True)
N, V, H = 41, 1300, 24


def problem(dtype=torch.float32, stored=torch.float32):
    torch.manual_seed(torch.initial_seed())  # the same one every time
    leaves = small_head(N=N, V=V, H=H, bias=True, lora=True).leaves(stored, False)
    hidden, weight, bias, a, b = (x.to(dtype) for x in (leaves.hidden, leaves.weight, leaves.bias, *leaves.lora[:2]))
    head = Head(hidden, weight, bias, LoRA(a, b, leaves.lora[2]), LogitTransform(1.2, 5.0, 0.8), dtype)
    return head, Tokens(leaves.labels, None, None, N)


@pytest.fixture(params=["fp32", "bf16", "csrc's bf16", "a library's bf16"])
def stored(request, monkeypatch) -> torch.dtype:
    """The type of a head, multiplied in fp32 or in bf16."""
    by_library = request.param == "a library's bf16"
    if by_library and not library.has_bf16():
        pytest.skip("this torch has no such MKL")
    monkeypatch.setattr(library, "USES_BF16", by_library)
    monkeypatch.setattr(library, "OWN_BF16", request.param == "csrc's bf16")
    for name in ("CROSSOVER", "CROSSOVER_BF16"):
        monkeypatch.setattr(cpu_backward, name, 1.0)
    return torch.float32 if request.param == "fp32" else torch.bfloat16


@pytest.mark.parametrize("pieces", ["one range", "ranges", "ranges and tiles"])
@pytest.mark.parametrize("how", ["exact", "one set", "two sets"])
def test_pieces_of_any_size_give_the_definition(monkeypatch, stored, how, pieces):
    """With tau of 0 or nearly so every pair is kept with a weight of nearly 1: the exact gradient."""
    if pieces != "one range":
        monkeypatch.setattr(cpu_backward, "BUFFER_BYTES", 4 * H * 7)
    if pieces == "ranges and tiles":
        monkeypatch.setattr(operands, "TILE_BYTES", 4 * H * 5)
        monkeypatch.setattr(cpu_backward, "TILE_BYTES", 4 * 60)
    routing = {"exact": None, "one set": Routing.of(0.0, 0.0, 3), "two sets": Routing.of(0.0, 1e-7, 3)}[how]
    coef = torch.randn(N)
    head, tokens = problem(stored, stored)
    saved = forward(head, tokens, routing=routing)
    grads = cpu_backward.backward(head, tokens, saved, Upstream(coef), routing, EVERYTHING)
    exact_head, _ = problem(torch.float64, stored)
    exact = reference.forward(exact_head, tokens)
    expected = reference.backward(exact_head, tokens, exact, Upstream(coef.double()), None, EVERYTHING)
    for name in Needs._fields:
        error = relative_error(getattr(grads, name), getattr(expected, name))
        assert error < (1e-5 if stored == torch.float32 else 6e-3), name


@pytest.mark.parametrize("wanted", Needs._fields)
def test_only_what_is_asked_for(wanted):
    head, tokens = problem()
    saved = forward(head, tokens)
    every = cpu_backward.backward(head, tokens, saved, Upstream(torch.ones(N)), None, EVERYTHING)
    one = cpu_backward.backward(head, tokens, saved, Upstream(torch.ones(N)), None, Needs(**{wanted: True}))
    for name in Needs._fields:
        if name == wanted:
            torch.testing.assert_close(getattr(one, name), getattr(every, name))
        else:
            assert getattr(one, name) is None


@pytest.mark.parametrize("count", [0, 1, 5, N])
@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("by_library", [False, True])
def test_no_row_stays_as_it_was_allocated(monkeypatch, by_library, how, count, stored):
    """What torch.empty gives is NaN here; tokens without a gradient, and blocks without a pair, leave zeros."""
    routing = Routing.of(0.3, 0.3, 5) if how == "routed" else None
    head, _ = problem(stored, stored)
    tokens = Tokens(torch.arange(count) * 31, None, None, count)
    head = head.replace(hidden=head.hidden[:count] * 30)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    if by_library:  # what asks in Python leaves the products to csrc
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    try:
        saved = forward(head, tokens, routing=routing)
        for coef in (torch.ones(count), torch.zeros(count)):
            grads = cpu_backward.backward(head, tokens, saved, Upstream(coef), routing, EVERYTHING)
            for name in Needs._fields:
                found = getattr(grads, name)
                assert found.isfinite().all(), name
                assert coef.any() or not found.any(), name
    finally:
        torch.use_deterministic_algorithms(before)


def test_bits_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(cpu_backward, "CROSSOVER", 1.0)
    routing, before = Routing.of(0.03, 0.01, 5), torch.get_num_threads()
    head, tokens = problem()
    saved, results = forward(head, tokens, routing=routing), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu_backward.backward(head, tokens, saved, Upstream(torch.ones(N)), routing, EVERYTHING))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(getattr(results[0], name), getattr(other, name)) for name in Needs._fields)
