"""patch_model under DeepSpeed's ZeRO-1 to 3: ranks with different data train as one process with all of it."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")

from wrapped_models import ALLOWED, backward, batch, build, errors, optimizer_of, patched, trained_in_one_process

from fastdpo.integrations import patch_model

for operator in deepspeed.ops.__compatible_ops__:
    deepspeed.ops.__compatible_ops__[operator] = False  # it would compile them, for a minute, on all ranks


def engine_of(model, stage):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Nothing is kept gathered because it is small
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]


def trained(rank, size, kind, stage, patched_first):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model = patched(kind) if patched_first else build(kind)
    engine, found = engine_of(model, stage), []
    if not patched_first:
        patch_model(model, backward="exact", stats=("entropy",))
    trainable = {name: x for name, x in model.named_parameters() if x.requires_grad}
    for step in range(2):
        logps = backward(engine, batch(rank, size, step), by=engine.backward)
        found.append((logps, {name: safe_get_full_grad(x).clone() for name, x in trainable.items()}))
        engine.step()
    return found, {name: safe_get_full_fp32_param(x).clone() for name, x in trainable.items()}


CASES = [("plain", 1, True), ("plain", 2, True), ("plain", 3, True), ("plain", 3, False), ("tied", 3, True)]


@pytest.mark.parametrize(("kind", "stage", "patched_first"), [*CASES, ("LoRA", 2, True)])
def test_two_ranks_train_as_one_process(kind, stage, patched_first, ranks):
    logps, grads, right = trained_in_one_process(kind, 2)
    for rank, (found, parameters) in enumerate(ranks(2)(trained, kind, stage, patched_first)):
        for step in range(2):
            assert (found[step][0] - logps[step][rank]).abs().max() <= ALLOWED * logps[0][0].abs().max()
            assert max(errors(found[step][1], grads[step]).values()) < ALLOWED
        assert max(errors(parameters, right).values()) < ALLOWED


def refused(rank, size):
    """{what: what was said}"""
    said = {}
    for kind in ("LoRA", "saved"):
        engine = engine_of(patched(kind), 3)
        with pytest.raises(NotImplementedError) as error:
            engine(**batch(rank, size, 1), fastdpo=True)
        said[kind] = str(error.value)
    model = build("plain")
    deepspeed.zero.Init(module=model)
    with pytest.raises(NotImplementedError) as error:
        patch_model(model)
    return said | {"Init": str(error.value)}


def test_what_would_be_wrong_is_refused(ranks):
    for said in ranks(2)(refused):
        for kind in ("LoRA", "saved"):
            assert re.search("leave the lm_head out of the adapters and of modules_to_save", said[kind]), said
        assert re.search("call patch_model after deepspeed.initialize", said["Init"])
