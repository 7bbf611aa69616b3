"""How a problem lies in memory, in which types and pieces, changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import (
    DTYPES,
    ENGINES,
    EPS,
    EVERY_PAIR,
    EXACT,
    assert_close,
    assert_equal,
    computed_by,
    gradients,
    problems,
)

import fastdpo
from fastdpo.ops.cpu import backward as cpu_backward
from fastdpo.ops.cpu import operands

engines = pytest.mark.parametrize("engine", ENGINES)
SAMPLED = {"backward": "routed", "tau": 0.1, "seed": 3}


LAYOUTS = {
    "every other": lambda x: torch.stack((x, x + 1), -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "offset": lambda x: torch.cat((x.new_ones(3), x.reshape(-1)))[3:].view(x.shape),
    "rows apart": lambda x: torch.nn.functional.pad(x, (2, 3))[..., 2 : 2 + x.shape[-1]],
    "rows far apart": lambda x: torch.stack((x, x), 0).transpose(0, 1)[:, 0] if x.ndim > 1 else x,
}
LAYOUT = st.sampled_from(list(LAYOUTS))


@engines
@given(problems(), st.tuples(LAYOUT, LAYOUT, LAYOUT, LAYOUT))
def test_layouts(engine, problem, layouts):
    plain, bit_for_bit = problem.head.leaves(problem.dtype), engine == "cpu"
    hidden, weight, labels, coef = (
        LAYOUTS[layout](x) for layout, x in zip(layouts, (plain.hidden, plain.weight, plain.labels, problem.coef))
    )
    options = {"lora": plain.lora, **problem.transform, **problem.backward}
    with computed_by(engine, bit_for_bit):
        logps = fastdpo.linear_logps(hidden, weight, labels, plain.bias, **options)
        ours = logps.detach(), gradients(logps, coef, plain.tensors())
        expected = problem.run()
    if bit_for_bit:
        assert_equal(ours, expected)
    assert_close(problem, ours, expected, 2)


@engines
@given(problems(), st.integers(1, 4))
def test_sequences_shifted_as_trainers_do(engine, problem, length):
    """hidden[:, :-1] and labels[:, 1:] have no flat views."""
    head, leaves = problem.head, problem.head.leaves(problem.dtype)
    count = len(head.labels) // length
    problem = problem.rows(torch.arange(count * length))
    longer = torch.full((count, length + 1, head.hidden.shape[1]), torch.nan, dtype=problem.dtype)
    longer[:, :-1] = leaves.hidden.detach()[: count * length].view(count, length, longer.shape[2])
    labels = torch.full((count, length + 1), 10**6)
    labels[:, 1:] = problem.head.labels.view(count, length)
    longer.requires_grad_()
    options = {"lora": leaves.lora, **problem.transform, **problem.backward}
    tensors = {**leaves.tensors(), "hidden": longer}
    with computed_by(engine):
        logps = fastdpo.linear_logps(longer[:, :-1], leaves.weight, labels[:, 1:], leaves.bias, **options)
        grads = gradients(logps, problem.coef.view(count, length), tensors)
        expected = problem.run()
    assert not grads["hidden"][:, -1].any()
    grads["hidden"] = grads["hidden"][:, :-1].reshape(count * length, longer.shape[2])
    assert_close(problem, (logps.detach().reshape(-1), grads), expected, 2)


@engines
@given(problems(dtypes=(torch.float32,)))
def test_gradients_added_in_place(engine, problem):
    head = problem.head.leaves(torch.float32)
    there = torch.randn(head.weight.shape, generator=problem.generator())
    head.weight.grad = there.clone()
    options = {"lora": head.lora, **problem.transform, **problem.backward}
    with computed_by(engine):
        logps = fastdpo.linear_logps(
            head.hidden, head.weight, head.labels, head.bias, accumulate_into="grad", **options
        )
        logps.backward(problem.coef)
        expected = problem.run()
    grads = {name: x.grad for name, x in head.tensors().items()}
    rounding = EPS * there.norm()
    assert (grads.pop("weight") - there - expected[1]["weight"]).norm() <= problem.bounds()[1]["weight"] * 2 + rounding
    assert_close(problem, (logps.detach(), grads), expected, 2)


@engines
@given(problems())
def test_one_upstream_gradient_expanded(engine, problem):
    with computed_by(engine):
        expected = problem.but(coef=torch.full_like(problem.coef, 0.7)).run()
        assert_equal(problem.but(coef=torch.tensor(0.7).expand(len(problem.coef))).run(), expected)


@engines
@given(problems(dtypes=(torch.bfloat16, torch.float16)), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_types_of_operands(engine, problem, of_weight, of_bias):
    """Values that every type holds: of the problem's, the first bits."""
    coarse = problem.head.leaves(torch.bfloat16, False).leaves(torch.float16, False)
    head = coarse.leaves(torch.bfloat16, False).leaves(torch.float64, False)
    fits = all(
        torch.equal(x, y)
        for x, y in zip(head.tensors().values(), coarse.leaves(torch.float64, False).tensors().values())
    )
    assume(fits)
    problem = problem.but(hidden=head.hidden, weight=head.weight, bias=head.bias, lora=None)
    leaves = problem.head.leaves(problem.dtype)
    leaves.weight = leaves.weight.detach().to(of_weight).requires_grad_()
    if leaves.bias is not None:
        leaves.bias = leaves.bias.detach().to(of_bias).requires_grad_()
    with computed_by(engine):
        logps = fastdpo.linear_logps(
            leaves.hidden, leaves.weight, leaves.labels, leaves.bias, **problem.transform, **problem.backward
        )
        ours = logps.detach(), gradients(logps, problem.coef, leaves.tensors())
    assert all(ours[1][name].dtype == x.dtype for name, x in leaves.tensors().items())
    coarsest = problem.but(dtype=torch.bfloat16)
    assert_close(coarsest, ours, problem.definition(), 2)


@given(problems(), st.sampled_from([1 << 12, 1 << 15, 1 << 18]), st.sampled_from([1, 1 << 10, 1 << 14]))
def test_sizes_of_tiles_and_buffers(problem, tile_bytes, buffer_bytes):
    with computed_by("cpu", deterministic=True):
        expected = problem.run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operands, "TILE_BYTES", tile_bytes)
            patch.setattr(cpu_backward, "TILE_BYTES", tile_bytes)
            patch.setattr(cpu_backward, "BUFFER_BYTES", buffer_bytes)
            ours = problem.run()
    assert torch.equal(ours[0], expected[0])
    assert_close(problem, ours, expected, 2)


@given(problems(backwards=(EXACT, EVERY_PAIR, SAMPLED)), st.booleans(), st.integers(2, 5))
def test_threads_change_no_bit(problem, deterministic, threads):
    before = torch.get_num_threads()
    with computed_by("cpu", deterministic):
        try:
            torch.set_num_threads(1)
            expected = problem.run()
            torch.set_num_threads(threads)
            ours = problem.run()
        finally:
            torch.set_num_threads(before)
    if deterministic:  # a library's own products may depend on its threads
        assert_equal(ours, expected)
    if problem.backward is not SAMPLED:
        assert_close(problem, ours, expected, 2)


@engines
@given(problems())
def test_labels_of_either_type(engine, problem):
    with computed_by(engine):
        assert_equal(problem.but(labels=problem.head.labels.int()).run(), problem.run())
