"""patch_model under DDP, FSDP2, HSDP and FSDP1: log-probs, gradients and two steps of ranks with different data are those
of one process with all of it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from fastdpo.integrations import patch_model, unpatch_model

V = 301  # shards of 151 and 150 rows, and of 76, 76, 76 and 73
KINDS = {
    "plain": None,
    "tied": None,
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def build(kind: str, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=kind == "tied",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
    if KINDS[kind] is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **KINDS[kind]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model.train()


def batch(rank: int, size: int, step: int) -> dict:
    """Of another length on every rank; the last one has no completion tokens."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(3, V, (2, 6 + 2 * rank), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + rank % 2] = -100
    if rank == size - 1:
        labels[:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(logps, entropy):
    weights = torch.linspace(-1.0, 2.0, logps.numel(), dtype=logps.dtype).view(logps.shape)
    return (logps * weights).sum() + (0.3 * entropy * weights.flip(0)).sum()


def definition(model, inputs):
    logps = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
    return picked, -(logps.exp() * logps).sum(-1).masked_fill(labels == -100, 0.0)


def optimizer_of(model):
    return torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.02, momentum=0.9)


@functools.cache
def expected(kind: str, size: int):
    """fp64, one process: (log-probs of each step and rank, gradients of each step, parameters)."""
    model = build(kind).double()
    optimizer, logps, grads = optimizer_of(model), [], []
    for step in range(2):
        parts = [definition(model, batch(rank, size, step)) for rank in range(size)]
        (sum(loss_of(*part) for part in parts) / size).backward()
        logps.append([part[0].detach() for part in parts])
        grads.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return logps, grads, {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}


# Layouts: what wraps a model


def inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def ddp(model):
    return DistributedDataParallel(model)


def own_group(model, **options):
    head = {} if "head_reshard" not in options else {"reshard_after_forward": options.pop("head_reshard")}
    for layer in inner(model).model.layers:
        fully_shard(layer, **options)
    fully_shard(inner(model).lm_head, **options, **head)
    return fully_shard(model, **options)


def with_norm(model, **options):
    for layer in inner(model).model.layers:
        fully_shard(layer, **options)
    fully_shard([inner(model).model.norm, inner(model).lm_head], reshard_after_forward=True, **options)
    return fully_shard(model, **options)


def with_embeddings(model, **options):
    fully_shard([model.model.embed_tokens, model.lm_head], reshard_after_forward=True, **options)
    return fully_shard(model, **options)


def root(model, **options):
    return fully_shard(model, **options)


def hsdp(wrap):
    def wrapped(model):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return wrap(model, mesh=mesh)

    return wrapped


def fsdp1(head_alone: bool, use_orig_params: bool):
    def wrapped(model):
        if head_alone:
            inner(model).lm_head = FullyShardedDataParallel(
                inner(model).lm_head, use_orig_params=use_orig_params, device_id=torch.device("cpu")
            )
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    return wrapped


LAYOUTS = {
    "DDP": (ddp, ("plain", "LoRA")),
    "own group": (functools.partial(own_group, head_reshard=True), tuple(KINDS)[:1] + tuple(KINDS)[2:]),
    "own group, kept": (functools.partial(own_group, head_reshard=False), ("plain", "DoRA")),
    "with norm": (with_norm, ("plain", "LoRA")),
    "with embeddings": (with_embeddings, ("tied",)),
    "root": (root, ("plain", "tied", "LoRA")),
    "root, resharded": (functools.partial(root, reshard_after_forward=True), ("plain",)),
    "FSDP1, root": (fsdp1(False, True), ("plain", "tied")),
    "FSDP1, head alone": (fsdp1(True, True), ("plain", "LoRA")),
    "FSDP1, head alone, flat": (fsdp1(True, False), ("plain",)),
}


def whole(x):
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().clone()


def named(model, gradients: bool) -> dict:
    found = {}
    for name, x in model.named_parameters():
        for prefix in ("_fsdp_wrapped_module.", "module."):
            name = name.replace(prefix, "", 1) if name.startswith("module.") or "_fsdp" in prefix else name
        name = name.replace("_fsdp_wrapped_module.", "")
        if (x.grad if gradients else x) is not None and x.requires_grad:
            found[name] = whole(x.grad if gradients else x)
    return found


def collected(model, gradients: bool) -> dict:
    if not isinstance(model, FullyShardedDataParallel):
        return named(model, gradients)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=gradients):
        return named(model, gradients)


def trained(rank, size, layout, kind):
    model = patch_model(build(kind), backward="exact", stats=("entropy",))
    model = LAYOUTS[layout][0](model)
    optimizer, logps, grads = optimizer_of(model), [], []
    for step in range(2):
        stats = model(**batch(rank, size, step), fastdpo=True)
        loss_of(stats.logps, stats.entropy).backward()
        logps.append(stats.logps.detach())
        if "flat" not in layout:
            grads.append(collected(model, True))
        optimizer.step()
        optimizer.zero_grad()
    return logps, grads, collected(model, False)


def assert_near(found: dict, right: dict, allowed: float):
    assert found.keys() == right.keys()
    most = max(x.norm() for x in right.values())
    for name, x in found.items():
        error = (x.double() - right[name]).norm() / (right[name].norm() + 1e-3 * most)
        assert error < allowed, (name, error)


def assert_trained(results, kind, allowed=2e-6):
    right_logps, right_grads, right = expected(kind, len(results))
    for rank, (logps, grads, parameters) in enumerate(results):
        for step in range(2):
            error = (logps[step] - right_logps[step][rank]).abs().max()
            assert error <= allowed * right_logps[step][0].abs().max(), (rank, step, error)
        for step in range(len(grads)):
            assert_near(grads[step], right_grads[step], allowed)
        assert_near(parameters, right, allowed)


CASES = [(layout, kind) for layout, (_, kinds) in LAYOUTS.items() for kind in kinds]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_two_ranks_train_as_one_process(layout, kind, ranks):
    assert_trained(ranks(2)(trained, layout, kind), kind)
