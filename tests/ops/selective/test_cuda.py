"""The CUDA kernels of logits -> logps: on a GPU where there is one; what decides whether they run, anywhere."""

from __future__ import annotations

import re

import pytest
import torch
from heads import relative_error

import fastdpo
from fastdpo.ops import native

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or native.cuda_problem() is not None,
    reason=f"needs a CUDA GPU and the CUDA kernels ({native.cuda_problem()})",
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize(
    "capability,runs",
    [((8, 0), True), ((8, 9), True), ((9, 0), True), ((7, 5), False), ((10, 3), False), ((12, 1), False)],
)
def test_which_gpus_machine_code_serves(capability, runs):
    assert native.serves(capability, [80, 90], ptx=[]) == runs
    assert native.serves(capability, [], ptx=[90]) == (capability >= (9, 0))


CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_gpu_from_the_oldest_on_is_served(capability):
    assert native.serves(capability, [80, 90, 100, 120], ptx=[100, 120])
    assert native.serves(capability, [80, 90, 100, 120], ptx=[120]) == (capability != (11, 0))


@pytest.mark.skipif(not hasattr(native.EXTENSION, "cuda_logits_forward"), reason="built without CUDA kernels")
def test_the_extension_holds_what_the_build_recorded():
    tool = pytest.importorskip("tools.kernel_code").run_tool
    path, info = native.EXTENSION.__file__, native.build_info()
    for option, recorded in (("--list-elf", info["cuda_archs"]), ("--list-ptx", info["cuda_ptx"])):
        held = re.findall(r"\.sm_(\d+)\.(?:cubin|ptx)", tool("cuobjdump", option, path))
        of_sources = {int(arch) for arch in held if held.count(arch) > 1}  # two; nvcc's linker adds an empty one
        assert of_sources == set(recorded), option
    oldest = min(info["cuda_archs"])
    for major, minor in CAPABILITIES:
        assert native.serves((major, minor), info["cuda_archs"], info["cuda_ptx"]) == (10 * major + minor >= oldest)


@pytest.mark.parametrize("forced", [None, "reference"])
def test_the_report_names_the_engine(monkeypatch, forced):
    monkeypatch.setattr(native, "cuda_problem", lambda capability=None: "no such GPU")
    if forced:
        monkeypatch.setenv("FASTDPO_ENGINE", forced)
    else:
        monkeypatch.delenv("FASTDPO_ENGINE", raising=False)
    report = fastdpo.backends()
    assert report["native"]["cuda_reason"] == "no such GPU"
    why = "FASTDPO_ENGINE" if forced else "no such GPU"
    assert report["operations"]["selective_log_softmax"]["cuda"] == f"reference ({why})"
    monkeypatch.setattr(native, "cuda_problem", lambda capability=None: None)
    wanted = "reference (FASTDPO_ENGINE)" if forced else "cuda (fastest for cuda)"
    assert fastdpo.backends()["operations"]["selective_log_softmax"]["cuda"] == wanted


def compare(logits, index, temperature=1.0, **options):
    """fastdpo on the logits' GPU against fp64 there."""
    leaf = logits.detach().requires_grad_()
    dlogps = torch.randn(index.shape, device=logits.device)
    given = leaf * 1 if options.get("inplace_backward") else leaf  # a product would lose the strides
    logps = fastdpo.selective_log_softmax(given, index, temperature=temperature, **options)
    (dlogits,) = torch.autograd.grad(logps, leaf, dlogps)
    oracle = logits.detach().double().requires_grad_()
    expected = (oracle / temperature).log_softmax(-1).gather(-1, index.clamp(min=0)[..., None])[..., 0]
    expected = expected * (index >= 0)
    expected.backward(dlogps.double())
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=4e-6)
    assert relative_error(dlogits, oracle.grad) < TOLERANCE[logits.dtype]


@on_gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("V", [7, 333, 4099, 32001, 128256, 1_000_003])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(dtype, V, inplace):
    N = 5
    logits = (torch.randn(N, V, device="cuda") * 4).to(dtype)
    index = torch.randint(V, (N,), device="cuda")
    index[1] = -100
    compare(logits, index, 0.7, inplace_backward=inplace)


@on_gpu
@pytest.mark.parametrize("N,V", [(3, 333), (3, 128256), (8, 1_000_003), (700, 32001)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entropy(dtype, N, V):
    logits = (torch.randn(N, V, device="cuda") * 4).to(dtype).requires_grad_()
    index = torch.randint(V, (N,), device="cuda")
    index[1] = -100
    coefs = torch.randn(2, N, device="cuda")
    outputs = fastdpo.selective_log_softmax(logits, index, temperature=0.7, return_entropy=True)
    (dlogits,) = torch.autograd.grad(outputs, logits, tuple(coefs))
    again = fastdpo.selective_log_softmax(logits, index, temperature=0.7, return_entropy=True)
    assert all(torch.equal(x, y) for x, y in zip(outputs, again))
    oracle = logits.detach().double().requires_grad_()
    logp = (oracle / 0.7).log_softmax(-1)
    kept = index >= 0
    expected = logp.gather(-1, index.clamp(min=0)[:, None])[:, 0] * kept, -(logp.exp() * logp).sum(-1) * kept
    (wanted,) = torch.autograd.grad(expected, oracle, tuple(coefs.double()))
    for ours, theirs in zip(outputs, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert relative_error(dlogits, wanted) < 2 * TOLERANCE[dtype]


@on_gpu
def test_rows_at_any_alignment_and_stride():
    base = torch.randn(40, 5000, device="cuda").bfloat16()
    for start in range(9):
        compare(base[:, start : start + 4001], torch.randint(4001, (40,), device="cuda"))


@on_gpu
def test_masked_and_invalid_rows():
    logits = torch.randn(5, 4000, device="cuda")
    logits[1] = torch.nan
    logits.requires_grad_()
    logps = fastdpo.selective_log_softmax(logits, torch.tensor([3, -100, 4000, -1, 0], device="cuda"))
    logps.sum().backward()
    assert logps[1] == 0 and (logits.grad[1] == 0).all()
    assert logps[2:4].isnan().all() and logits.grad[2:4].isnan().all()
    assert logps[[0, 4]].isfinite().all() and logits.grad[[0, 4]].isfinite().all()


@on_gpu
def test_offsets_past_32_bits():
    N, V = 17_000, 131_072  # 2.2e9 elements, 4.2 GiB
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(V, device="cuda")
    logits.requires_grad_()
    index = torch.full((N,), -100, device="cuda")
    index[-1] = V - 1
    logps = fastdpo.selective_log_softmax(logits, index)
    logps.sum().backward()
    oracle = logits[-1].detach().double().requires_grad_()
    expected = oracle.log_softmax(0)[-1]
    expected.backward()
    torch.testing.assert_close(logps[-1].double(), expected.detach(), rtol=1e-5, atol=4e-6)
    assert relative_error(logits.grad[-1], oracle.grad) < TOLERANCE[torch.bfloat16]


@on_gpu
def test_nothing_waits_and_the_callers_stream_is_used():
    logits = torch.randn(64, 32000, device="cuda").bfloat16().requires_grad_()
    index = torch.randint(32000, (64,), device="cuda")

    def step():
        return torch.autograd.grad(fastdpo.selective_log_softmax(logits, index).sum(), logits)[0]

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # which fails on a launch into any other stream
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used():
    compare(torch.randn(8, 5000, device="cuda:1"), torch.randint(5000, (8,), device="cuda:1"))
