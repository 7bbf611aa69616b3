"""What every engine gives row by row, and which engine serves a call."""

from __future__ import annotations

import pytest
import torch
from heads import small_head

import fastdpo
from fastdpo.ops import engines as ops
from fastdpo.ops.problem import STATS, Head, Needs, Rows, Upstream
from fastdpo.routing import Routing, unpack_bits

NEEDS = Needs(True, True, False, False, False)
KEPT, IGNORED, INVALID = [0, 2, 4, 5], [1, 3], [6]


@pytest.fixture
def problem():
    head = small_head(N=7, V=300, H=16).leaves(torch.float32, False)
    labels = head.labels.clone()
    labels[IGNORED], labels[INVALID] = -7, 300
    head = Head(head.hidden, head.weight)
    return head, Rows(labels, -7, 0, 300), Routing(0.0, 0.0, torch.tensor(-3))


def call(problem, coef):
    head, rows, routing = problem
    engine = ops.engine_for(head.hidden.device, head.hidden.dtype)
    result = engine.forward(head, rows, stats=frozenset(STATS), routing=routing, shards=None)
    return result, engine.backward(head, rows, result, Upstream(coef), routing, NEEDS)


def test_every_row_has_its_place(engine, problem):
    result, grads = call(problem, torch.ones(7))
    for name in ("logps", "lse", "entropy", "mean_logit", "log_sum_sq_probs"):
        values = getattr(result, name)
        assert values.shape == (7,) and values.dtype == torch.float32
        assert (values[IGNORED] == 0).all() and values[INVALID].isnan().all() and values[KEPT].isfinite().all()
    assert result.is_top1.dtype == torch.bool and not result.is_top1[IGNORED + INVALID].any()
    assert result.bitmap.shape == (7, 1) and unpack_bits(result.bitmap, 3).sum(1).tolist() == [3, 0, 3, 0, 3, 3, 0]
    assert grads.hidden.shape == (7, 16)
    assert (grads.hidden[IGNORED] == 0).all() and grads.hidden[INVALID].isnan().all()
    assert grads.hidden[KEPT].isfinite().all() and grads.weight.isfinite().all()


def test_upstream_gradients_of_ignored_rows_are_not_read(engine, problem):
    coef = torch.arange(7.0)
    _, expected = call(problem, coef)
    coef[IGNORED + INVALID] = torch.nan
    _, grads = call(problem, coef)
    torch.testing.assert_close(grads.hidden, expected.hidden, equal_nan=True)
    torch.testing.assert_close(grads.weight, expected.weight)


def test_nothing_ignored_nothing_copied(monkeypatch):
    """The adapter passes hidden and every saved tensor on as it got them."""
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    leaves = small_head(N=6, V=300).leaves(torch.float32, False)
    head = Head(leaves.hidden.view(2, 3, -1), leaves.weight)
    rows, routing = Rows(leaves.labels, -100, 0, 300), Routing(0.0, 0.0, torch.tensor(1))
    adapter = ops.engine_for(leaves.hidden.device, torch.float32)
    seen = {}

    class Engine:
        @staticmethod
        def forward(head, tokens, **options):
            seen["result"] = adapter.engine.forward(head, tokens, **options)
            return seen["result"]

        @staticmethod
        def backward(head, tokens, saved, upstream, routing, needs):
            seen.update(head=head, tokens=tokens, saved=saved, upstream=upstream)
            return adapter.engine.backward(head, tokens, saved, upstream, routing, needs)

    spy, coef = type(adapter)(Engine), torch.ones(6)
    result = spy.forward(head, rows, stats=frozenset(["entropy"]), routing=routing)
    spy.backward(head, rows, result, Upstream(coef), routing, NEEDS)
    assert seen["head"].hidden.data_ptr() == leaves.hidden.data_ptr() and seen["head"].weight is leaves.weight
    assert seen["tokens"].rows is None and seen["upstream"].coef is coef
    for name in ("logps", "lse", "entropy", "bitmap"):
        assert getattr(seen["saved"], name) is getattr(seen["result"], name)


UNAVAILABLE = [
    ("triton", "cpu", "3.6.0", {}, "CUDA tensors, not cpu, unless TRITON_INTERPRET=1"),
    ("triton", "mps", "3.6.0", {"TRITON_INTERPRET": "1"}, "CUDA tensors, not mps"),
    ("triton", "cuda", None, {}, "not installed"),
    ("triton", "cuda", "3.5.1", {}, "3.5.1 is older than 3.6"),
    ("triton", "cuda", "3.10.0+git", {}, None),
    ("triton", "cpu", "3.6.0", {"TRITON_INTERPRET": "1"}, None),
    ("cpu", "cuda", "3.6.0", {}, "CPU tensors, not cuda"),
    ("reference", "mps", None, {}, None),
]


@pytest.mark.parametrize("engine_name,device,version,environment,reason", UNAVAILABLE)
def test_why_an_engine_cannot_run(monkeypatch, engine_name, device, version, environment, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ops, "_triton_version", lambda: version)
    problem = ops._unavailable(engine_name, device)
    assert problem is None if reason is None else reason in problem


def test_choice_of_engine(monkeypatch):
    monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops, "_triton_version", lambda: "3.6.0")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ops.engine_name(cuda, torch.bfloat16) == "triton"
    assert ops.engine_name(cuda, torch.float64) == "reference"
    assert ops.engine_name(cpu, torch.float32) != "triton"  # the interpreter only where it is asked for
    monkeypatch.setenv("FASTDPO_ENGINE", "triton")
    assert ops.engine_name(cpu, torch.float32) == "triton"
    assert ops.engine_name(cpu, torch.float64) == "reference"
    assert ops.logits_engine(cpu, torch.float32) == (ops.reference.logits_forward, ops.reference.logits_backward)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"FASTDPO_ENGINE=triton cannot run here.*TRITON_INTERPRET"):
        fastdpo.linear_logps(torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(6, dtype=torch.int64))
