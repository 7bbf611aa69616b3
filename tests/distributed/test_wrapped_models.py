"""patch_model under DDP, FSDP2, HSDP and FSDP1: ranks with different data train as one process with all of it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

pytest.importorskip("transformers")
pytest.importorskip("peft")

import wrapped_models
from wrapped_models import LAYOUTS, batch, build, definition, errors, loss_of, optimizer_of, trained_in_one_process, whole

from fastdpo.integrations import patch_model, unpatch_model

ALLOWED = 2e-6  # of fp64, in fp32


def wrapped(layout, kind="plain", **options):
    return LAYOUTS[layout](patch_model(build(kind), backward="exact", stats=("entropy",)), **options)


def backward(model, *batches):
    scored = [model(**inputs, fastdpo=True) for inputs in batches]
    sum(loss_of(stats.logps, stats.entropy) for stats in scored).backward()
    return scored[0].logps.detach()


def trained(rank, size, layout, kind):
    model = wrapped(layout, kind)
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


# Two batches, whose gradients add up however they come about


def one_by_one(model, first, second):
    backward(model, first)
    backward(model, second)


def without_sync(model, first, second):
    """The first one's gradients stay on their rank."""
    if hasattr(model, "no_sync"):
        with model.no_sync():
            backward(model, first)
    else:
        model.set_requires_gradient_sync(False)
        backward(model, first)
        model.set_requires_gradient_sync(True)
    backward(model, second)


def at_once(model, first, second):
    """One model scored twice before the backward, as chosen and rejected completions may be."""
    backward(model, first, second)


def with_calls_between(model, first, second):
    stats = model(**first, fastdpo=True)
    with torch.no_grad():
        assert torch.equal(model(**first, fastdpo=True).logps, stats.logps)
        assert model(second["input_ids"]).logits.shape[-1] == wrapped_models.V
    loss_of(stats.logps, stats.entropy).backward()
    backward(model, second)


def checkpointed(model, first, second):
    getattr(model, "module", model).gradient_checkpointing_enable()
    one_by_one(model, first, second)


def written_to(model, first, second):
    """What is done to the result does not get past the hooks."""
    stats = model(**first, fastdpo=True)
    stats.logps[first["labels"][:, 1:] == -100] = 0.0
    stats.logps.mul_(1.0)
    loss_of(stats.logps, stats.entropy).backward()
    backward(model, second)


def unpatched_between(model, first, second):
    backward(model, first)
    unpatch_model(getattr(model, "module", model))
    loss_of(*definition(model, second)).backward()


def seen_by_hooks(model, first, second):
    """Hooks before and behind the wrapper's see logits of one position, and may look."""
    shapes = []
    head = getattr(model, "module", model).lm_head
    for prepend in (True, False):
        head.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)), prepend=prepend)
    one_by_one(model, first, second)
    assert shapes == [(2, 1, wrapped_models.V)] * 4


HOW = (one_by_one, without_sync, at_once, with_calls_between, checkpointed, written_to, unpatched_between, seen_by_hooks)


def gradients(rank, size, layout, how):
    model = wrapped(layout)
    how(model, batch(rank, size, 0), batch(rank, size, 1))
    return whole(model, True)


def gradients_in_one_process(size, dtype=torch.float64):
    model = build("plain").to(dtype)
    sum(loss_of(*definition(model, batch(rank, size, step))) / size for rank in range(size) for step in range(2)).backward()
    return {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", ["DDP", "own group", "with norm", "root", "FSDP1, head alone"])
def test_gradients_add_up(layout, how, ranks):
    right = gradients_in_one_process(2)
    for grads in ranks(2)(gradients, layout, how):
        found = errors(grads, right)
        assert max(found.values()) < ALLOWED, found


def in_bf16(rank, size, layout, output_dtype):
    """(log-probs, gradients): ours, and through the model's own logits under the same wrapper."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype)
    ours, own = wrapped(layout, mp_policy=policy), wrapped(layout, mp_policy=policy)
    inputs = batch(rank, size, 0)
    logps, entropy = definition(own, inputs)
    loss_of(logps, entropy).backward()
    return backward(ours, inputs), whole(ours, True), logps.detach(), whole(own, True)


@pytest.mark.parametrize("layout", ["own group", "with norm", "root"])
def test_mixed_precision(layout, ranks):
    """bf16's own error, that of logits rounded to bf16."""
    right_logps, (right, _), _ = trained_in_one_process("plain", 2)
    for rank, (logps, grads, own_logps, own) in enumerate(ranks(2)(in_bf16, layout, torch.float32)):
        assert logps.dtype == torch.float32
        expected = right_logps[0][rank]
        assert (logps - expected).abs().max() <= (own_logps - expected).abs().max()
        found, allowed = errors(grads, right), errors(own, right)
        assert sum(found.values()) <= sum(allowed.values()), (found, allowed)
        assert all(found[name] <= 1.5 * allowed[name] for name in found), (found, allowed)
