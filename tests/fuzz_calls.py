"""Real calls of every function of the native extension, for fuzz_bindings: small ones, of the public functions."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import fastdpo
from fastdpo.ops import native
from fastdpo.ops.cpu import backward as cpu_backward
from fastdpo.ops.cpu import library
from tests import cuda_on_cpu
from tests.fuzz_bindings import Fields, Recorder
from tests.heads import SmallHead, small_head

TAUS = (0.05, (0.02, 0.3), (0.3, 0.02))
# With another argument than a struct's fields, or none.
WITHOUT_FIELDS = {
    *("isa", "supported_isas", "use_isa", "load_bf16_product"),
    *("parallel_backend", "pieces_of_last_loop", "logits_splits"),
}


def record(seed: int, cuda: bool = False) -> tuple[object, list[tuple[str, Fields]]]:
    """The extension, or the CUDA kernels compiled for the CPU, and what was called with which fields."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FASTDPO_ENGINE", "cpu")
        patched.setattr(cpu_backward, "CROSSOVER", 2.0)
        patched.setattr(cpu_backward, "CROSSOVER_BF16", 2.0)
        if cuda:
            patched.delenv("FASTDPO_ENGINE")
            recorder = Recorder(cuda_on_cpu.load())
            cuda_on_cpu.install(patched, recorder.extension, seed)
            native.EXTENSION.kernels = recorder
        else:
            recorder = Recorder(native.EXTENSION)
            for name, module in list(sys.modules.items()):
                if name.startswith("fastdpo.") and hasattr(module, "EXTENSION"):
                    patched.setattr(module, "EXTENSION", recorder)
            heads(patched)
            divergences()
            with_entropy_and_lists(recorder)
        logits()
        losses()
    expected = {
        name
        for name in dir(recorder.extension)
        if not name.startswith("_") and name not in WITHOUT_FIELDS and callable(getattr(recorder.extension, name))
    }
    expected -= {"seed", "cuda_error_text", "cuda_runtime_version", "cuda_driver_version"}
    if not library.has_bf16():
        expected -= {"bf16_product"}
    missing = {name for name in expected if cuda or not name.startswith("cuda_")} - {name for name, _ in recorder.calls}
    assert not missing, f"nothing calls {missing}"
    return recorder.extension, recorder.calls


def step(head: SmallHead, dtype: torch.dtype, **options) -> None:
    leaves = head.leaves(dtype)
    given = {"bias": leaves.bias, "lora": leaves.lora, **({"seed": 1} if "tau" in options else {}), **options}
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, **given)
    (logps * torch.rand_like(logps)).sum().backward()


def heads(patched) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tau in TAUS:
            step(small_head(N=13, V=300, H=20, bias=True, lora=True, masked=True), dtype, tau=tau)
        step(small_head(N=7, V=700, H=24, masked=True), dtype, backward="exact", softcap=5.0)
        step(small_head(N=100, V=150, H=8, lora=True), dtype, backward="exact")
    patched.setattr(library, "OWN_BF16", True)
    for tau in TAUS:
        step(small_head(N=13, V=300, H=20, bias=True, lora=True, masked=True), torch.bfloat16, tau=tau)
    step(small_head(N=9, V=300, H=20, bias=True), torch.bfloat16, backward="exact")
    patched.setattr(library, "OWN_BF16", False)
    if library.has_bf16():
        patched.setattr(library, "USES_BF16", True)
        for tau in TAUS:
            step(small_head(N=13, V=300, H=20, bias=True, lora=True, masked=True), torch.bfloat16, tau=tau)
        step(small_head(N=9, V=300, H=20, bias=True), torch.bfloat16, backward="exact")
        patched.setattr(library, "USES_BF16", False)
    head = small_head(N=9, V=300, H=8).leaves(torch.float32)
    stats = fastdpo.linear_token_stats(head.hidden, head.weight, head.labels)
    (stats.logps + stats.entropy).sum().backward()


def divergences() -> None:
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        for labels in (torch.randint(0, 300, (11,)), torch.ones(11, dtype=torch.bool)):
            for options in ({"tau": 0.1, "seed": 1}, {"backward": "exact", "softcap": 3.0}):
                head, teacher = (small_head(N=11, V=300, H=size, bias=True).leaves(torch.float32) for size in (12, 8))
                both = head.hidden, head.weight, teacher.hidden.detach(), teacher.weight.detach()
                biases = {"bias": head.bias, "ref_bias": teacher.bias.detach()}
                found = fastdpo.linear_divergence(*both, labels, **biases, kind=kind, **options)
                found.divergence.sum().backward()


def with_entropy_and_lists(recorder: Recorder) -> None:
    """What an engine leaves to others: lists of rows for `grad`, the sums of a shard for `route`."""
    for name, fields in list(recorder.calls):
        rows = len(fields["labels"]) if name in ("grad", "route") else 0
        if name == "grad" and rows > 1:
            listed = torch.arange(len(fields["data"]), dtype=torch.int32).flip(0)
            recorder.calls.append((name, {**fields, "tokens": listed, "coef_lse": torch.ones(rows)}))
        if name == "route":
            before, sums = torch.ones(2, 2, rows, dtype=torch.int64)
            recorder.calls.append((name, {**fields, "before": before, "sums": sums}))


def logits() -> None:
    for dtype, columns in ((torch.float32, 300), (torch.bfloat16, 301), (torch.float16, 9000)):
        given, index = torch.randn(5, columns).to(dtype).requires_grad_(), torch.randint(0, columns, (5,))
        fastdpo.selective_log_softmax(given, index).sum().backward()


def losses() -> None:
    names = ["sigmoid", "ipo", "sft"]
    for dtype in (torch.float32, torch.float64):
        logps, ref = torch.randn(2, 6, 9, dtype=dtype).sub(3).requires_grad_(True).unbind(0)
        sequences = [x.sum(1) for x in (logps[:3], logps[3:], ref[:3], ref[3:])]
        lengths = {"chosen_lengths": torch.full((3,), 9), "rejected_lengths": torch.full((3,), 9)}
        fastdpo.preference_loss(*sequences, loss_type=names[:2], **lengths).loss.backward()
    head = small_head(N=6 * 8, V=140, H=8).leaves(torch.float32)
    hidden, labels = head.hidden.view(6, 8, 8), head.labels.view(6, 8)
    options = {"loss_type": names, "ld_alpha": 0.5, "use_weighting": True, "seed": 1}
    for ref_logps in (torch.randn(6), torch.randn(6, 8)):
        fastdpo.linear_dpo_loss(hidden, head.weight, labels, ref_logps=ref_logps, **options).loss.backward()
    offsets = torch.tensor([0, 8, 15, 20, 31, 40, 48], dtype=torch.int32)
    for cu_seqlens in (offsets, offsets.long()):
        packed = {"ref_logps": torch.randn(6), "cu_seqlens": cu_seqlens, "average_log_prob": True}
        fastdpo.linear_dpo_loss(head.hidden, head.weight, head.labels, **packed).loss.backward()
    if os.environ.get("FASTDPO_ENGINE"):
        both = {"ref_hidden": hidden.detach(), "ref_weight": head.weight.detach(), "loss_type": ["tdpo2", "kto"]}
        fastdpo.linear_dpo_loss(hidden, head.weight, labels, seed=1, **both).loss.backward()
