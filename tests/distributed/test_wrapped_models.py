"""patch_model under DDP, FSDP2, HSDP and FSDP1: ranks with different data train as one process with all of it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

pytest.importorskip("transformers")
pytest.importorskip("peft")

from wrapped_models import (
    ALLOWED,
    LAYOUTS,
    backward,
    batch,
    definition,
    errors,
    loss_of,
    optimizer_of,
    patched,
    trained_in_one_process,
    whole,
)


def trained(rank, size, layout, kind):
    model = LAYOUTS[layout](patched(kind))
    optimizer, logps, grads = optimizer_of(model), [], []
    for step in range(2):
        logps.append(backward(model, batch(rank, size, step)))
        grads.append(whole(model, True) if layout != "FSDP1, flat" else None)
        optimizer.step()
        optimizer.zero_grad()
    return logps, grads, whole(model, False)


def assert_trained(results, kind):
    right_logps, right_grads, right = trained_in_one_process(kind, len(results))
    for rank, (logps, grads, parameters) in enumerate(results):
        for step in range(2):
            error = (logps[step] - right_logps[step][rank]).abs().max()
            assert error <= ALLOWED * right_logps[step][0].abs().max(), (rank, step, error)
            if grads[step] is not None:
                found = errors(grads[step], right_grads[step])
                assert max(found.values()) < ALLOWED, found
        found = errors(parameters, right)
        assert max(found.values()) < ALLOWED, found


ON_TWO = {
    "DDP": ("plain", "LoRA"),
    "own group": ("plain", "LoRA", "DoRA", "saved"),
    "own group, kept": ("plain", "DoRA"),
    "with norm": ("plain", "LoRA"),
    "with embeddings": ("tied",),
    "root": ("plain", "tied", "LoRA"),
    "root, resharded": ("plain",),
    "FSDP1": ("plain", "tied"),
    "FSDP1, head alone": ("plain", "LoRA"),
    "FSDP1, flat": ("plain",),
}
ON_FOUR = {"own group": ("plain",), "own group, HSDP": ("plain", "LoRA"), "with norm, HSDP": ("plain",)}


@pytest.mark.parametrize(("layout", "kind"), [(layout, kind) for layout in ON_TWO for kind in ON_TWO[layout]])
def test_two_ranks_train_as_one_process(layout, kind, ranks):
    assert_trained(ranks(2)(trained, layout, kind), kind)


@pytest.mark.parametrize(("layout", "kind"), [(layout, kind) for layout in ON_FOUR for kind in ON_FOUR[layout]])
def test_four_ranks_train_as_one_process(layout, kind, ranks):
    assert_trained(ranks(4)(trained, layout, kind), kind)


def in_bf16(rank, size, layout, rounded):
    """(log-probs, gradients): ours, and through the model's own logits under the same wrapper."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    models = [patched("plain") for _ in range(2)]
    for model in models:
        if rounded:  # the head's own output
            fully_shard(model.lm_head, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
            fully_shard(model, mp_policy=policy)
        else:
            LAYOUTS[layout](model, mp_policy=policy)
    ours, own = models
    inputs = batch(rank, size, 0)
    logps, entropy = definition(own, inputs)
    loss_of(logps, entropy).backward()
    return backward(ours, inputs), whole(ours, True), logps.detach(), whole(own, True)


@pytest.mark.parametrize(("layout", "rounded"), [("own group", False), ("with norm", False), ("own group", True)])
def test_mixed_precision(layout, rounded, ranks):
    """bf16's own error: hidden states have it, and log-probs are not rounded besides."""
    right_logps, (right, _), _ = trained_in_one_process("plain", 2)
    for rank, (logps, grads, own_logps, own) in enumerate(ranks(2)(in_bf16, layout, rounded)):
        assert (logps.dtype == torch.float32 and not torch.equal(logps, logps.bfloat16().float())) or rank == 1
        expected = right_logps[0][rank]
        assert (logps - expected).abs().sum() <= 1.1 * (own_logps - expected).abs().sum()
        found, allowed = errors(grads, right), errors(own, right)
        assert sum(found.values()) <= 1.1 * sum(allowed.values()), (found, allowed)
        assert all(found[name] <= 1.5 * allowed[name] for name in found), (found, allowed)
