"""patch_model and tensor parallelism: the head is computed on its shards of the vocabulary, also under FSDP."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

transformers = pytest.importorskip("transformers")

from wrapped_models import (
    ALLOWED,
    backward,
    batch,
    build,
    definition,
    errors,
    loss_of,
    optimizer_of,
    patched,
    trained_in_one_process,
    whole,
)

from fastdpo.integrations import patch_model

# What each rank has of the logits, and as what
STYLES = {
    "a part": {},
    "all": {"output_layouts": Replicate()},
    "a part of a DTensor": {"use_local_output": False},
    "all, as a DTensor": {"output_layouts": Replicate(), "use_local_output": False},
}


def split(model, mesh, style):
    return parallelize_module(model, mesh, {"lm_head": ColwiseParallel(**STYLES[style])})


def one_mesh(size):
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))


def patched_then_split(size, style):
    return split(patched("plain"), one_mesh(size), style)


def split_then_patched(size, style):
    return patch_model(split(build("plain"), one_mesh(size), style), backward="exact", stats=("entropy",))


def scored(rank, size, make, *arguments):
    """All ranks have the same tokens."""
    model = make(size, *arguments)
    assert isinstance(model.lm_head.weight, DTensor)
    logps = backward(model, batch(0, 2, 0))
    with torch.no_grad():
        assert torch.equal(model(**batch(0, 2, 0), fastdpo=True).logps, logps)
    return logps, whole(model, True)


def assert_right(results):
    model, inputs = build("plain").double(), batch(0, 2, 0)
    logps, entropy = definition(model, inputs)
    loss_of(logps, entropy).backward()
    right = {name: x.grad for name, x in model.named_parameters()}
    for found, grads in results:
        assert (found - logps).abs().max() <= ALLOWED * logps.abs().max()
        assert max(errors(grads, right).values()) < ALLOWED
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("style", STYLES)
def test_patched_then_split(style, ranks):
    assert_right(ranks(2)(scored, patched_then_split, style))


@pytest.mark.parametrize("style", [style for style in STYLES if style != "a part"])
def test_split_then_patched(style, ranks):
    assert_right(ranks(2)(scored, split_then_patched, style))


def refused(rank, size):
    with pytest.raises(ValueError, match=r"returns 15[01] of the 301 logits.*before the head is split"):
        split_then_patched(size, "a part")


def test_a_head_that_gives_each_rank_a_part_is_patched_before(ranks):
    ranks(2)(refused)


def planned(size, folder):
    """By the plan of transformers itself, on the head and on all layers."""
    return patch_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").train(),
        backward="exact",
        stats=("entropy",),
    )


def test_the_plan_of_transformers(ranks, tmp_path):
    build("plain").save_pretrained(tmp_path)
    assert_right(ranks(2)(scored, planned, str(tmp_path)))


def trained(rank, size, style, own_group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = split(patched("plain"), mesh["tp"], style)
    for module in [model.lm_head, model] if own_group else [model]:
        fully_shard(module, mesh=mesh["dp"])
    optimizer, found = optimizer_of(model), []
    for step in range(2):
        logps = backward(model, batch(mesh.get_local_rank("dp"), 2, step))
        found.append((logps, whole(model, True)))
        optimizer.step()
        optimizer.zero_grad()
    return mesh.get_local_rank("dp"), found, whole(model, False)


@pytest.mark.parametrize("own_group", [True, False])
@pytest.mark.parametrize("style", ["a part", "all"])
def test_under_fsdp(style, own_group, ranks):
    logps, grads, right = trained_in_one_process("plain", 2)
    for of_data, found, parameters in ranks(4)(trained, style, own_group):
        for step in range(2):
            assert (found[step][0] - logps[step][of_data]).abs().max() <= ALLOWED * logps[0][0].abs().max()
            assert max(errors(found[step][1], grads[step]).values()) < ALLOWED
        assert max(errors(parameters, right).values()) < ALLOWED
