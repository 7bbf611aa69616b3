"""Tiny models in the wrappers of torch.distributed, a batch for each rank, and what one process makes of all."""

from __future__ import annotations

import functools

import peft
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastdpo.integrations import patch_model

ALLOWED = 2e-6  # error relative to fp64, in fp32
V = 301  # shards of 151 and 150 rows, and of 76, 76, 76 and 73
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "plain": None,
    "tied": None,
    "softcap": None,
    "LoRA": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def build(kind: str):
    torch.manual_seed(0)
    if kind == "softcap":
        options = {"final_logit_softcapping": 3.0, "head_dim": 8, "tie_word_embeddings": False}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE, **options))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=kind == "tied"))
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
    """Of another length on every rank; the last one has no completion tokens in the first step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(3, V, (2, 6 + 2 * rank), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + rank % 2] = -100
    if rank == size - 1 and step == 0:
        labels[:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(logps, entropy):
    weights = torch.linspace(-1.0, 2.0, logps.numel(), dtype=logps.dtype).view(logps.shape)
    return (logps * weights).sum() + (0.3 * entropy * weights.flip(0)).sum()


def definition(model, inputs):
    """(log-probs, entropy) by the model's own logits."""
    logits = model(inputs["input_ids"]).logits[:, :-1]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
    return picked, -(logps.exp() * logps).sum(-1).masked_fill(labels == -100, 0.0)


def optimizer_of(model):
    return torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.02, momentum=0.9)


@functools.cache
def trained_in_one_process(kind: str, size: int):
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


def inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _groups(*names: str, kept: bool = False):
    """FSDP2: modules of these names in one group, each layer in one, the rest in the root's."""

    def wrap(model, **options):
        modules = [inner(model).get_submodule(name) for name in names]
        for layer in inner(model).model.layers:
            fully_shard(layer, **options)
        fully_shard(modules if len(modules) > 1 else modules[0], reshard_after_forward=not kept, **options)
        return fully_shard(model, **options)

    return wrap


def _hsdp(wrap):
    def wrapped(model, **options):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return wrap(model, mesh=mesh, **options)

    return wrapped


def _fsdp1(head_alone: bool, use_orig_params: bool = True):
    def wrap(model):
        options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        if head_alone:
            inner(model).lm_head = FullyShardedDataParallel(inner(model).lm_head, **options)
        return FullyShardedDataParallel(model, **options)

    return wrap


LAYOUTS = {
    "DDP": DistributedDataParallel,
    "own group": _groups("lm_head"),
    "own group, kept": _groups("lm_head", kept=True),
    "own group, HSDP": _hsdp(_groups("lm_head")),
    "with norm": _groups("model.norm", "lm_head"),
    "with norm, HSDP": _hsdp(_groups("model.norm", "lm_head")),
    "with embeddings": _groups("model.embed_tokens", "lm_head"),
    "root": fully_shard,
    "root, resharded": lambda model: fully_shard(model, reshard_after_forward=True),
    "FSDP1": _fsdp1(False),
    "FSDP1, head alone": _fsdp1(True),
    "FSDP1, flat": _fsdp1(True, use_orig_params=False),
}


def without_prefixes(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def whole(model, gradients: bool) -> dict:
    """{name: parameter or its gradient}, gathered."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=gradients):
            return _whole(model, gradients)
    return _whole(model, gradients)


def _whole(model, gradients: bool) -> dict:
    found = {}
    for name, parameter in model.named_parameters():
        x = parameter.grad if gradients else parameter
        if x is not None and parameter.requires_grad:
            x = x.full_tensor() if hasattr(x, "full_tensor") else x
            found[without_prefixes(name)] = x.detach().clone()
    return found


def errors(found: dict, right: dict) -> dict:
    """Relative to each tensor's own norm, or a thousandth of the largest."""
    assert found.keys() == right.keys()
    most = max(x.norm() for x in right.values())
    return {
        name: ((x.double() - right[name]).norm() / max(right[name].norm(), 1e-3 * most)).item()
        for name, x in found.items()
    }


def patched(kind: str):
    return patch_model(build(kind), backward="exact", stats=("entropy",))


def backward(model, *batches, by=torch.Tensor.backward):
    """The backward of all of them at once; the first one's log-probs."""
    scored = [model(**inputs, fastdpo=True) for inputs in batches]
    by(sum(loss_of(stats.logps, stats.entropy) for stats in scored))
    return scored[0].logps.detach()
