"""What only a GPU can show: nothing waits, a step is captured in a CUDA graph, results repeat. Skipped without one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from heads import peaked_head, relative_error

import fastdpo

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if fastdpo.backends()["engines"]["triton"]["reason"]:
    pytest.skip(fastdpo.backends()["engines"]["triton"]["reason"], allow_module_level=True)

from fastdpo.ops.problem import Head, Rows
from fastdpo.ops.triton import forward as triton_forward
from fastdpo.ops.triton import special
from fastdpo.ops.triton.call import Call
from fastdpo.ops.triton.fold import plain_fold
from fastdpo.ops.triton.launch import target_of

B, T, V, H = 4, 96, 8192, 256


def step_inputs(seed: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [2B, T, H], weight [V, H], labels [2B, T], ref_logps [2B]) with prompt tokens ignored."""
    torch.manual_seed(seed)
    head = peaked_head(N=2 * B * T, V=V, H=H)
    labels = head.labels.view(2 * B, T).clone()
    labels[:, : T // 3] = -100
    return (
        head.hidden.view(2 * B, T, H).to("cuda", dtype),
        head.weight.to("cuda", dtype),
        labels.cuda(),
        torch.randn(2 * B, device="cuda") - 50,
    )


def loss_of(hidden, weight, labels, ref_logps, **options):
    return fastdpo.linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, **options).loss


@pytest.mark.parametrize("options", [{}, {"backward": "exact"}, {"seed": 7}], ids=["routed", "exact", "seeded"])
def test_no_wait_for_the_device(options):
    hidden, weight, labels, ref_logps = step_inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    loss_of(hidden, weight, labels, ref_logps, **options).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(hidden, weight, labels, ref_logps, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{"seed": 7}, {"backward": "exact"}], ids=["routed", "exact"])
def test_a_step_in_a_cuda_graph(options):
    hidden, weight, labels, ref_logps = step_inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    inputs = (hidden, weight)

    def step():
        loss = loss_of(hidden, weight, labels, ref_logps, **options)
        return loss, *torch.autograd.grad(loss, inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = step_inputs(1)
    with torch.no_grad():
        for static, fresh in zip((hidden, weight, labels, ref_logps), other):
            static.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(captured, step()):
        assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_repeats_bit_for_bit(deterministic):
    hidden, weight, labels, ref_logps = step_inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        results = []
        for _ in range(3):
            loss = loss_of(hidden, weight, labels, ref_logps, tau=(0.02, 0.01), seed=3)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    finally:
        torch.use_deterministic_algorithms(False)
    for loss, dhidden, dweight in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(dweight, results[0][2])
        assert relative_error(dhidden, results[0][1]) < 1e-2
        assert not deterministic or torch.equal(dhidden, results[0][1])


def test_a_second_device_or_stream_is_respected():
    hidden, weight, labels, ref_logps = step_inputs(0)
    expected = loss_of(hidden, weight, labels, ref_logps, backward="exact")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = loss_of(hidden, weight, labels, ref_logps, backward="exact")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(ours, expected)
    if torch.cuda.device_count() > 1:
        moved = [x.to("cuda:1") for x in (hidden, weight, labels, ref_logps)]
        assert relative_error(loss_of(*moved, backward="exact").cpu(), expected.cpu()) < 1e-5


def has_special_forward() -> bool:
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor in special.KERNELS


def forms_of_special_forward() -> list[str]:
    return list(special.load(special.KERNELS[target_of(torch.device("cuda")).capability]).FORMS)


@pytest.mark.skipif(not has_special_forward(), reason="no special forward for this architecture")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "N,V,H", [(1, 1, 8), (70, 257, 64), (300, 1000, 192), (2000, 50257, 256), (1100, 32000, 896), (4096, 128256, 4096)]
)
def test_the_special_forward_against_the_plain_one(N, V, H, dtype):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(N, H, device="cuda").to(dtype),
        torch.randn(V, H, device="cuda").mul(2 / H**0.5).to(dtype),
    )
    labels = torch.randint(V, (N,), device="cuda")
    labels[::7] = -100
    head, rows = Head(hidden, weight, compute_dtype=dtype), Rows(labels, -100, 0, V)
    results = []
    for form in (None, *forms_of_special_forward() * 2):
        with special.forced(form):
            saved = triton_forward.forward(head, rows)
        results.append(torch.stack((saved.logps, saved.lse)))
    plain, *ours = results
    for one in ours:
        assert torch.equal(one, ours[0])  # a race would show
        torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not has_special_forward(), reason="no special forward for this architecture")
def test_the_special_forward_passes_its_comparison():
    kernel = special.load(special.KERNELS[target_of(torch.device("cuda")).capability])
    for dtype in (torch.bfloat16, torch.float16):
        head = Head(torch.randn(8, 1024, device="cuda").to(dtype), torch.zeros(8, 1024, device="cuda", dtype=dtype))
        call = Call(head.replace(compute_dtype=dtype), Rows(torch.zeros(8, device="cuda").long(), -100, 0, 8))
        for form in kernel.FORMS:
            assert special.difference(call, partial(kernel.fold, form=form), plain_fold) <= special.TOLERANCE
