"""Calls of wrapped models: accumulated, one after another, beside other calls; and what is refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from wrapped_models import (
    ALLOWED,
    LAYOUTS,
    V,
    backward,
    batch,
    build,
    definition,
    errors,
    inner,
    loss_of,
    patched,
    whole,
)

from fastdpo.integrations import lazy_logits, patch_model, unpatch_model
from fastdpo.models.lm_head import applied_head

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
        assert model(second["input_ids"]).logits.shape[-1] == V
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
    assert shapes == [(2, 1, V)] * 4


HOW = (
    one_by_one,
    without_sync,
    at_once,
    with_calls_between,
    checkpointed,
    written_to,
    unpatched_between,
    seen_by_hooks,
)


def gradients(rank, size, layout, how, kind="plain"):
    model = LAYOUTS[layout](patched(kind))
    how(model, batch(rank, size, 0), batch(rank, size, 1))
    return whole(model, True)


def gradients_in_one_process(size, kind="plain", **configuration):
    model = build(kind).double()
    model.config.update(configuration)
    for rank in range(size):
        for step in range(2):
            (loss_of(*definition(model, batch(rank, size, step))) / size).backward()
    return {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", ["own group", "with norm", "root", "FSDP1, head alone"])
def test_gradients_add_up(layout, how, ranks):
    right = gradients_in_one_process(2)
    for grads in ranks(2)(gradients, layout, how):
        found = errors(grads, right)
        assert max(found.values()) < ALLOWED, found


def with_another_softcap(model, first, second):
    """The call in which that is seen runs the model again, on all ranks."""
    model.config.final_logit_softcapping = 2.0
    at_once(model, first, second)
    assert model.forward.transform.softcap == 2.0


@pytest.mark.parametrize("layout", ["own group", "with norm"])
def test_a_configuration_that_changes_after_wrapping(layout, ranks):
    right = gradients_in_one_process(2, "softcap", final_logit_softcapping=2.0)
    for grads in ranks(2)(gradients, layout, with_another_softcap, "softcap"):
        found = errors(grads, right)
        assert max(found.values()) < ALLOWED, found


# What would be wrong is refused


class Nested(transformers.LlamaForCausalLM):
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.top = nn.Sequential(self.lm_head)
        del self.lm_head

    def get_output_embeddings(self):
        return self.top[0]

    def forward(self, input_ids=None, **_):
        return (self.top(self.model(input_ids).last_hidden_state),)


def part_alone(kind, part, fsdp1=False):
    model = patched(kind)
    owner, _, name = part.rpartition(".")
    owner = inner(model).get_submodule(owner)
    if fsdp1:
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        setattr(owner, name, FullyShardedDataParallel(getattr(owner, name), **options))
        return FullyShardedDataParallel(model, **options)
    fully_shard(getattr(owner, name))
    return fully_shard(model)


def around_the_head():
    model = patch_model(Nested(build("plain").config))
    fully_shard(model.top)
    return fully_shard(model)


def doubled(module, args, output):
    return 2 * output


def with_a_hook(layout, before):
    model = patched("plain")
    if before:
        model.lm_head.register_forward_hook(doubled)
    wrapped = LAYOUTS[layout](model)
    if not before:
        model.lm_head.register_forward_hook(doubled)
    return wrapped


def patched_late():
    return patch_model(fully_shard(build("plain")))


def outside_of_its_forward():
    applied_head(fully_shard(build("plain")).lm_head, torch.zeros(2, 32))


def lazily():
    with lazy_logits(fully_shard(build("plain")).lm_head):
        pass


REFUSED = {
    "base layer": (part_alone, ("LoRA", "lm_head.base_layer"), "Linear inside of an lm_head.*in its own forward alone"),
    "B": (part_alone, ("LoRA", "lm_head.lora_B.default"), "Linear inside of an lm_head.*in its own forward alone"),
    "saved": (part_alone, ("saved", "lm_head.modules_to_save.default"), "Linear inside.*in its own forward alone"),
    "FSDP1, A": (
        part_alone,
        ("LoRA", "lm_head.lora_A.default", True),
        "FullySharded.*inside.*in its own forward alone",
    ),
    "hook before": (with_a_hook, ("own group", True), "a hook of its lm_head, .*doubled"),
    "hook after": (with_a_hook, ("with norm", False), "a hook of its lm_head, .*doubled"),
    "hook inside": (with_a_hook, ("FSDP1, head alone", True), "a hook of its lm_head, .*doubled"),
    "hook outside": (with_a_hook, ("FSDP1, head alone", False), "a hook of its lm_head, .*doubled"),
    "around": (around_the_head, (), "FSDP applied to a .*Sequential that the lm_head is a part of"),
    "late": (patched_late, (), "call patch_model before"),
    "outside": (outside_of_its_forward, (), "Linear whose weight FSDP has split and not gathered"),
    "lazily": (lazily, (), "lazy logits of an lm_head that FSDP"),
}


def refused(rank, size):
    """{case: what was said}; a rank that raises here would take the group with it."""
    said = {}
    for case, (function, arguments, _) in REFUSED.items():
        with pytest.raises((NotImplementedError, ValueError)) as error:
            function(*arguments)(**batch(rank, size, 1), fastdpo=True)
        said[case] = str(error.value)
    return said


def test_what_would_be_wrong_is_refused(ranks):
    for said in ranks(2)(refused):
        for case, (_, _, match) in REFUSED.items():
            assert re.search(match, said[case]), said[case]
