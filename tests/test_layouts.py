"""tests/layouts.py, a few thousand cases of it, and the cases that were wrong before its rule was kept."""

from __future__ import annotations

import layouts
import pytest
import torch
from heads import small_head

import fastdpo

CASES = {"reference": 2000, "cpu": 2000, "triton": 300}
# In Triton's interpreter the head's own function, whose kernels differ; the others reach them through it.
KINDS = {"triton": ("linear",) * 9 + ("dpo",)}


@pytest.mark.slow_in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_any_layout_is_right(engine, seeded):
    kinds = KINDS.get(engine, tuple(layouts.KINDS))
    with layouts.quick_interpreter(engine):
        found = next(layouts.failures(engine, CASES[engine], seeded, 8, kinds), None)
    assert found is None, found


def test_a_layout_is_what_it_says():
    """The generator itself: equal values, poison around them, stride 0 where a dimension is constant."""
    import random

    rng, strides, poisoned = random.Random(0), set(), 0
    for _ in range(200):
        x = torch.randn(2, 1, 5).expand(2, 3, 5).contiguous()
        view = layouts.relaid(x, rng)
        assert torch.equal(view, x)
        strides.add(view.stride())
        memory = torch.empty(0).set_(view.untyped_storage())
        poisoned += bool(memory.isnan().any())
    assert len(strides) > 50 and any(s[1] == 0 for s in strides) and poisoned > 100


HIDDEN = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one of two": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0],
    "permuted": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "expanded along H": lambda x: x[..., :1].contiguous().expand(x.shape),
    "negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("skip,options", [("labels", {"seed": 1}), ("upstream", {"backward": "exact"})])
@pytest.mark.parametrize("layout", HIDDEN)
def test_hidden_of_any_layout_with_rows_left_out(engine, layout, skip, options):
    head = small_head(N=6, V=130, H=16).leaves(torch.float32, False)
    hidden = HIDDEN[layout](head.hidden.view(1, 6, 16)).requires_grad_()
    labels, upstream = head.labels.view(1, 6).clone(), torch.ones(1, 6)
    (labels if skip == "labels" else upstream)[0, 2:4] = -100 if skip == "labels" else 0
    plain = hidden.detach().resolve_neg().contiguous().clone().requires_grad_()
    ours, expected = (fastdpo.linear_logps(x, head.weight, labels, **options) for x in (hidden, plain))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, upstream)[0] for y, x in ((ours, hidden), (expected, plain)))
    )


LABELS = {
    "column": lambda y: torch.stack((y, torch.full_like(y, layouts.poison(y.dtype))), 1)[:, 0],
    "every other": lambda y: torch.stack((y, torch.full_like(y, layouts.poison(y.dtype))), 1).view(-1)[::2],
    "expanded": lambda y: y[:1].expand(y.shape),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", LABELS)
def test_labels_of_any_layout(engine, layout, dtype):
    head = small_head(N=8, V=130, H=16).leaves(torch.float32, False)
    labels = LABELS[layout](head.labels.to(dtype))
    expected = fastdpo.linear_logps(head.hidden, head.weight, labels.contiguous())
    assert torch.equal(fastdpo.linear_logps(head.hidden, head.weight, labels), expected)


def test_economies_of_layout_remain(monkeypatch):
    """Slices along the tokens, and heads with rows apart, are read where they lie."""
    from fastdpo.ops.by_token import completion_tokens
    from fastdpo.ops.problem import Head, Rows
    from fastdpo.tensors import in_rows

    states, table = torch.randn(2, 5, 16), torch.randn(130, 24)
    for hidden in (states[:, :-1], states[0, :, :12], states[:, 0]):
        weight = table[:, : hidden.shape[-1]]
        head = Head(in_rows(hidden), in_rows(weight, apart=True))
        rows = Rows(torch.zeros(hidden.shape[:-1].numel(), dtype=torch.int64), -100, 0, 130)
        assert head.hidden is hidden and head.weight is weight
        tokens, _, _ = completion_tokens(head, rows)
        assert tokens.hidden.data_ptr() == hidden.data_ptr()


def test_inplace_backward_refuses_shared_memory(engine):
    logits = (torch.randn(1, 40, requires_grad=True) * 1).expand(3, 40)
    with pytest.raises(ValueError, match=r"inplace_backward needs memory for each of the logits; strides \(0, 1\)"):
        fastdpo.selective_log_softmax(logits, torch.tensor([1, 2, 3]), inplace_backward=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_whose_rows_overlap(engine, dtype):
    logits = torch.randn(60).to(dtype).as_strided((6, 50), (1, 1))
    index = torch.tensor([0, 3, 49, -100, 7, 8])
    ours, expected = (fastdpo.selective_log_softmax(x, index) for x in (logits, logits.contiguous()))
    torch.testing.assert_close(ours, expected)


def _far_apart(x: torch.Tensor) -> torch.Tensor:
    """`x` in rows of which the last one begins past 2^31 elements; pages between them are never touched."""
    stride = 2**31 // (len(x) - 1) + 5
    try:
        memory = torch.empty((len(x) - 1) * stride + x.shape[1], dtype=x.dtype)
    except RuntimeError:
        pytest.skip("the system does not promise so much memory")
    return memory.as_strided(x.shape, (stride, 1)).copy_(x)


@pytest.mark.parametrize("options", [{"backward": "exact"}, {"seed": 1, "tau": 0.5}], ids=["exact", "routed"])
def test_offsets_past_2_to_the_31_elements(engine, options):
    hidden, weight = (torch.randn(rows, 16, dtype=torch.float16) for rows in (5, 300))
    labels, found = torch.randint(300, (5,)), []
    for place in (torch.clone, _far_apart):
        leaves = [place(x).requires_grad_() for x in (hidden, weight)]
        logps = fastdpo.linear_logps(*leaves, labels, **options)
        found.append((logps.detach(), *torch.autograd.grad(logps.sum(), leaves)))
    for near, far in zip(*found):
        assert torch.equal(near, far)


def test_offsets_of_logits_past_2_to_the_31_elements(engine):
    logits, index, found = torch.randn(5, 300, dtype=torch.float16), torch.randint(300, (5,)), []
    for place in (torch.clone, _far_apart):
        leaf = place(logits).requires_grad_()
        logps = fastdpo.selective_log_softmax(leaf, index)
        found.append((logps.detach(), *torch.autograd.grad(logps.sum(), leaf)))
    assert all(torch.equal(near, far) for near, far in zip(*found))
