"""Hidden states and heads that are DTensors: what is computed on which rank, and where gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from mesh_cases import Case, H, check, placements, scored, tensors

import fastdpo

TWO = {
    "tensor parallel": Case((2,), ("tp",), "S"),
    "by vocab_group, without a name": Case((2,), None, "S", vocab_dimension=0),
    "by hidden, without a name": Case((2,), None, "S", hidden="R"),
    "hidden over the name": Case((2,), ("dp",), "S", hidden="R"),
    "bias and B whole on the mesh": Case((2,), ("tp",), "S", others="R"),
    "bias and B plain": Case((2,), ("model",), "S", others="plain"),
    "the whole head on every rank": Case((2,), ("tp",), "R"),
    "and split bias and B": Case((2,), ("tp",), "R", others="S"),
    "nothing says whose": Case((2,), None, "R"),
    "frozen weight": Case((2,), ("tp",), "S", frozen=("weight", "hidden")),
    "only hidden": Case((2,), ("tp",), "S", frozen=("weight", "bias", "lora_a", "lora_b")),
    "data parallel": Case((2,), ("dp",), "R", rows=(23, 11), own=(0,)),
    "FSDP, gathered": Case((2,), ("fsdp",), "S", rows=(23, 11), own=(0,), travels=False),
    "FSDP by columns": Case((2,), ("fsdp",), "C", others="R", rows=(23, 11), own=(0,)),
    "hidden split by rows": Case((2,), ("dp",), "S", hidden="S", rows=(23,), own=(0,), travels=False),
    "sequence parallel": Case((2,), ("tp",), "S", hidden="S", rows=(23,), own=(0,), travels=False),
    "bf16": Case((2,), ("tp",), "S", dtype=torch.bfloat16),
}
FOUR = {
    "tensor parallel, 4, uneven": Case((4,), ("tp",), "S", V=301),
    "FSDP x tensor parallel": Case((2, 2), ("dp_shard", "tp"), "SS", rows=(23, 11), own=(0,), travels=None),
    "replicated x tensor parallel": Case((2, 2), ("dp_replicate", "tp"), "RS", rows=(23, 11), own=(0,)),
    "hybrid": Case((2, 2), ("dp_replicate", "dp_shard"), "RS", rows=(23, 11, 1, 40), own=(0, 1), travels=False),
    "routed, every pair": Case(
        (2, 2), ("dp", "tp"), "SS", rows=(23, 11), own=(0,), options={"backward": "routed", "tau": 0.0, "seed": 3}
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(ranks, name):
    case = TWO[name]
    check(case, ranks(2)(scored, case), 2e-6 if case.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", FOUR)
def test_on_four_ranks(ranks, name):
    check(FOUR[name], ranks(4)(scored, FOUR[name]))


def _fully_sharded(rank, size):
    """FSDP2 over tensor parallelism as torch makes it: _StridedShard on the outer dimension."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    groups, head = tensors(Case((2, 2), (), "", rows=(9, 14)))
    module = torch.nn.Linear(H, 301)
    with torch.no_grad():
        module.weight.copy_(head[0])
        module.bias.copy_(head[1])
    parallelize_module(module, mesh["tp"], ColwiseParallel())
    fully_shard(module, mesh=mesh["dp_shard"])
    hidden, labels = groups[mesh.get_coordinate()[0]]
    logps = fastdpo.linear_logps(hidden.float(), module.weight, labels, module.bias, backward="exact")
    logps.sum().backward()
    kinds = [type(p).__name__ for p in module.weight.placements]
    assert kinds == ["_StridedShard", "Shard"] and module.weight.grad.placements == module.weight.placements
    return mesh.get_coordinate()[0], logps.detach(), module.weight.grad.full_tensor(), module.bias.grad.full_tensor()


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 refuses parts of unequal sizes there")
def test_fsdp_over_tensor_parallelism_as_torch_lays_it_out(ranks):
    groups, (weight, bias, *_) = tensors(Case((2, 2), (), "", rows=(9, 14)))
    weight.requires_grad_(), bias.requires_grad_()
    expected = [fastdpo.linear_logps(hidden, weight, labels, bias, backward="exact") for hidden, labels in groups]
    sum(x.sum() for x in expected).backward()
    for group, logps, dweight, dbias in ranks(4)(_fully_sharded):
        torch.testing.assert_close(logps.double(), expected[group].detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dweight.double(), weight.grad, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(dbias.double(), bias.grad, rtol=2e-5, atol=2e-6)


def _on_a_part_of_the_mesh(rank, size):
    """A head on one dimension of the mesh that hidden is on, as within FSDP's forward over tensor parallelism."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    groups, (weight, *_) = tensors(Case((2, 2), (), "", rows=(14,)))
    hidden, labels = groups[0]
    hidden = distribute_tensor(hidden.float(), mesh, placements("SR")).requires_grad_()
    weight = distribute_tensor(weight.float(), mesh["inner"], placements("S")).requires_grad_()
    logps = fastdpo.linear_logps(hidden, weight, labels.chunk(2)[mesh.get_coordinate()[0]], backward="exact")
    logps.sum().backward()
    summed = weight.grad.full_tensor()
    dist.all_reduce(summed, group=mesh.get_group(0))  # of the other rows, FSDP's part
    assert isinstance(hidden.grad, DTensor) and hidden.grad.placements == hidden.placements
    return mesh.get_coordinate()[0], logps.detach(), summed, hidden.grad.full_tensor()


def test_a_head_on_a_part_of_the_mesh_of_hidden(ranks):
    groups, (weight, *_) = tensors(Case((2, 2), (), "", rows=(14,)))
    hidden, labels = groups[0]
    expected = fastdpo.linear_logps(hidden.requires_grad_(), weight.requires_grad_(), labels, backward="exact")
    expected.sum().backward()
    for place, logps, dweight, dhidden in ranks(4)(_on_a_part_of_the_mesh):
        torch.testing.assert_close(logps.double(), expected.detach().chunk(2)[place], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dweight.double(), weight.grad, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(dhidden.double(), hidden.grad, rtol=2e-5, atol=2e-6)


def _losses(rank, size):
    """The whole loss, of policy and reference, on shards; and the head's own as the reference's."""
    from torch.distributed.tensor import distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    groups, (weight, bias, *_) = tensors(Case((2,), (), "", rows=(24, 24)))
    (hidden, labels), (ref_hidden, _) = groups
    shapes = (4, 6)
    given = {"hidden": hidden.float().view(*shapes, H), "labels": labels.view(shapes), "weight": weight.float()}
    given |= {"bias": bias.float(), "ref_hidden": ref_hidden.float().view(*shapes, H)}
    answers = []
    for dressed in (False, True):
        for more in ({}, {"ref_weight": weight.flip(0).float(), "ref_bias": bias.float()}):
            x = given | more
            if dressed:
                names = {name: "S" if name.endswith(("weight", "bias")) else "R" for name in x}
                x = {
                    name: distribute_tensor(x[name].detach().clone(), mesh, placements(how))
                    for name, how in names.items()
                }
            x["weight"].requires_grad_(True)
            x["weight"].grad = None
            out = fastdpo.linear_dpo_loss(**x, backward="exact", use_weighting=True)
            out.loss.backward()
            gradient = x["weight"].grad
            answers.append([*(value.detach() for value in out), gradient.full_tensor() if dressed else gradient])
    return answers


def test_the_loss_takes_them_too(ranks):
    for plain, other, sharded, other_sharded in ranks(2)(_losses):
        torch.testing.assert_close(sharded, plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other_sharded, other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(plain[0], other[0])


def _refusals(rank, size):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    def mesh(name):
        return dist.init_device_mesh("cpu", (2,), mesh_dim_names=None if name is None else (name,))

    def on(x, name, how):
        return distribute_tensor(x, mesh(name), placements(how))

    torch.manual_seed(3)
    hidden, weight, labels, bias = (
        torch.randn(6, H),
        torch.randn(40, H),
        torch.zeros(6, dtype=torch.int64),
        torch.randn(40),
    )
    partial = DTensor.from_local(weight, mesh("tp"), placements("P"), run_check=False)
    tp, dp = mesh("tp"), mesh("dp")
    split = distribute_tensor(weight, tp, placements("S"))
    calls = {
        "ambiguous": {"weight": on(weight, None, "S")},
        "partial": {"weight": partial},
        "by columns": {"weight": on(weight, "tp", "C")},
        "hidden by features": {"hidden": on(hidden, "tp", "C")},
        "hidden split": {"hidden": on(hidden, "tp", "S"), "weight": split, "vocab_group": tp},
        "not split": {"weight": on(weight, "tp", "R"), "vocab_group": tp},
        "two meshes": {"weight": split, "bias": on(bias, "other", "S")},
        "labels": {"labels": on(labels, "tp", "S")},
        "an empty shard": {"weight": on(weight[:1], "tp", "S")},
        "a piece of the bias": {"weight": split, "bias": bias[:20]},
        "after all this": {"weight": split},
    }
    told = {}
    for name, changes in calls.items():
        try:
            fastdpo.linear_logps(**({"hidden": hidden, "weight": weight, "labels": labels} | changes))
            told[name] = "served"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    assert isinstance(split.placements[0], Shard) and dp is not None
    return told


REFUSED = {
    "ambiguous": r"TypeError: weight is a DTensor .*mesh dimension 0.*name the dimension.*vocab_group=, or pass hidden",
    "partial": r"TypeError: weight is a DTensor placed P.*redistribute\(\) it to Shard\(0\) or Replicate on 'tp'",
    "by columns": r"TypeError: weight is a DTensor placed S\(1\).*it to Shard\(0\) or Replicate on 'tp'",
    "hidden by features": r"TypeError: hidden is a DTensor placed S\(1\).*to Replicate or to Shard of its rows",
    "hidden split": r"TypeError: hidden is a DTensor placed S\(0\).*to Replicate on 'tp', over which weight is split",
    "not split": r"ValueError: vocab_group is given, but weight, a DTensor .*is not split along the vocabulary",
    "two meshes": r"ValueError: bias lies on DeviceMesh.*pass all on one mesh",
    "labels": r"ValueError: labels is a DTensor with placements .*but hidden is not on its mesh",
    "an empty shard": r"ValueError: vocab_group: refused by rank 1: ValueError: weight must have at least one row",
    "a piece of the bias": r"ValueError: bias must have the 40 rows of weight; got shape \(20,\)",
    "after all this": "served",
}


def test_what_is_refused_says_what_to_do(ranks):
    import re

    for told in ranks(2)(_refusals):
        for name, message in REFUSED.items():
            assert re.match(message, told[name]), (name, told[name])
