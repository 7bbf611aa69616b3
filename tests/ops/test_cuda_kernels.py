"""What running the CUDA kernels on the CPU finds: faults planted in a copy of them, and what a sanitizer sees."""

from __future__ import annotations

import subprocess

import cuda_on_cpu
import pytest
import torch
from ops.preference import test_templates as templates

from fastdpo.linear_dpo import _DPOOptions
from fastdpo.ops import native
from fastdpo.ops.selective import cuda as cuda_logits

BARRIERS = {
    "logits": (
        "cuda/logits.cu",
        "__syncthreads();  // every warp's sums",
    ),
    "last sum": ("cuda/preference.cu", "    __syncthreads();  // the last sum has been read\n"),
    "sum": ("cuda/preference.cu", "x;\n    __syncthreads();\n    double"),
    "last scan": ("cuda/preference.cu", "    __syncthreads();  // the scratch of the last scan has been read\n"),
    "last block": ("cuda/preference.cu", "  __syncthreads();\n  if (is_last)"),
}


def results() -> list[torch.Tensor]:
    """Of every kernel."""
    logits, labels = torch.randn(6, 5000), torch.randint(5000, (6,))
    logps, lse, _ = cuda_logits.forward(logits, labels, 1.0)
    dlogits = torch.empty_like(logits)
    cuda_logits.backward(logits, labels, logps, lse, torch.ones(6), 1.0, dlogits)
    batch = templates.Batch(False, "tokens", torch.float32)
    ours = batch.native(_DPOOptions.of(loss_type=["sigmoid", "sft"], ld_alpha=0.5, use_weighting=True))
    return [logps, lse, dlogits, *ours, *batch.gradients(ours)]


def test_no_order_of_threads_changes_a_number(cuda_on_the_cpu):
    runs = []
    for seed in range(4):
        native.EXTENSION.kernels.seed(seed)
        torch.manual_seed(0)
        runs.append(results())
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


NIGHTLY = ("last sum", "last scan", "last block")  # each is a compilation of its own; one of each file's is not
SLOW = pytest.mark.slow


@pytest.mark.parametrize("barrier", [pytest.param(x, marks=[SLOW] * (x in NIGHTLY)) for x in BARRIERS])
def test_a_missing_barrier_is_a_wrong_number_or_a_deadlock(barrier, cuda_on_the_cpu, monkeypatch):
    name, text = BARRIERS[barrier]
    without = text.replace("__syncthreads();", "")
    broken = cuda_on_cpu.load({name: {text: without}})
    for seed in range(8):
        torch.manual_seed(seed)
        expected = results()
        with monkeypatch.context() as patched:
            patched.setattr(native.EXTENSION, "kernels", broken)
            broken.seed(seed)
            torch.manual_seed(seed)
            try:
                if not all(torch.equal(x, y) for x, y in zip(results(), expected)):
                    return
            except RuntimeError as error:
                assert "a deadlock" in str(error)
                return
    pytest.fail("every number is right without it")


def test_a_barrier_that_some_threads_leave_out_is_a_deadlock(cuda_on_the_cpu, monkeypatch):
    name, text = BARRIERS["logits"]
    broken = cuda_on_cpu.load({name: {text: text.replace("__syncthreads();", "if (warp != 2) __syncthreads();")}})
    monkeypatch.setattr(native.EXTENSION, "kernels", broken)
    with pytest.raises(RuntimeError, match=r"a deadlock: at a barrier, threads 0-63 96-255; .* exited, 64-95"):
        results()


def test_a_lane_outside_of_a_shuffles_mask_is_named(cuda_on_the_cpu, monkeypatch):
    broken = cuda_on_cpu.load({"cuda/preference.cu": {"__shfl_xor_sync(0xffffffffu": "__shfl_xor_sync(0x7fffffffu"}})
    monkeypatch.setattr(native.EXTENSION, "kernels", broken)
    with pytest.raises(RuntimeError, match=r"thread \d+: a shuffle from lane \d+, mask 2147483647"):
        results()


def test_a_launch_that_no_device_takes(cuda_on_the_cpu, monkeypatch):
    broken = cuda_on_cpu.load({"cuda/logits.cu": {"? kThreadsOfShortRow : kMaxThreads": "? kThreadsOfShortRow : 1056"}})
    monkeypatch.setattr(native.EXTENSION, "kernels", broken)
    with pytest.raises(RuntimeError, match=r"cuda_logits_forward.*CUDA error 9"):
        results()


def run_sanitized(tests: str, changes: cuda_on_cpu.Changes | None = None) -> subprocess.CompletedProcess:
    try:
        return cuda_on_cpu.run_sanitized("-k", tests, changes=changes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except cuda_on_cpu.Unavailable as reason:
        pytest.skip(str(reason))


def test_every_kernel_under_the_sanitizers(cuda_kernels):
    done = run_sanitized(
        "test_coef_zero or test_blocks_of or test_entropy_and_splits or test_layouts_and or several-all"
    )
    assert done.returncode == 0, done.stdout


BEYOND = {  # test: function that is seen, file, text, with a write of one element beyond
    "test_blocks_of": ("grad_row", "shared/logits_row.h", "else out[i] = gradient", "else out[i + 1] = gradient"),
    "test_layouts_and": (
        "spread_pair",
        "shared/preference_batch.h",
        "dtokens[at] = saturated",
        "dtokens[at + 1] = saturated",
    ),
}


@pytest.mark.parametrize("test", ["test_blocks_of", pytest.param("test_layouts_and", marks=SLOW)])
def test_a_write_of_one_element_beyond_is_found(test, cuda_kernels):
    function, name, old, new = BEYOND[test]
    done = run_sanitized(test, {name: {old: new}})
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout
    assert "WRITE of size" in done.stdout and function in done.stdout, done.stdout
