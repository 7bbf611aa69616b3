"""What only a GPU can show: nothing waits, a step is captured in a CUDA graph, results repeat. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from heads import peaked_head, relative_error

import fastdpo

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if fastdpo.backends()["engines"]["triton"]["reason"]:
    pytest.skip(fastdpo.backends()["engines"]["triton"]["reason"], allow_module_level=True)

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
