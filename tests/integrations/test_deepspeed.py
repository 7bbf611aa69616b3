"""DeepSpeed's ZeRO on ranks with different data trains as one process with all of it: `make test-deepspeed`."""

from __future__ import annotations

import functools
import os

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="not installed: make test-deepspeed", exc_type=ImportError)
pytest.importorskip("trl", minversion="1.16")

from deepspeed.comm.torch import build_shm_op
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl_ranks import BATCH, assert_same_training, save_model, train

from fastdpo.integrations import patch_model

EXACT, ROUTED = {"backward": "exact"}, {"backward": "routed", "tau": 0.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Compiles what DeepSpeed does at its first use, before ranks do and wait for each other; in a folder of the run's
    own: a lock that a killed run has left in the shared one is waited for without end."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("extensions"))
    build_shm_op()
    yield {}
    del os.environ["TORCH_EXTENSIONS_DIR"]


@pytest.fixture
def path(made, tiny_llama, tmp_path_factory):
    if not made:
        made["path"] = save_model(tmp_path_factory.mktemp("model"), tiny_llama)
    return made["path"]


def zero(stage: int, **config) -> dict:
    # By default ZeRO-3 splits no parameter of a model this small, and gradients are clipped to 1
    parameters = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return config | {"zero_optimization": parameters, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}


def whole(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, x in model.named_parameters():
        with deepspeed.zero.GatheredParameters([x], enabled=hasattr(x, "ds_id")):
            found[name] = x.detach().clone()
    return found


def is_split(x: torch.Tensor) -> bool:
    return hasattr(x, "ds_id") and x.numel() == 0 and x.ds_tensor.numel() < x.ds_numel


# TRL


@functools.cache
def in_one_process(path: str, kind: str):
    """By TRL alone."""
    start = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    return train(path, kind, 1, None)[:2], {name: x.detach() for name, x in start.items()}


def on_a_rank(rank, size, path, kind, stage, patch):
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    config = zero(stage, **config)
    try:
        logged, parameters, trainer = train(
            path, kind, size, patch, parameters=lambda trainer: whole(trainer.model), deepspeed=config
        )
    finally:
        unset_hf_deepspeed_config()  # by which transformers would split the next model
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    assert all(is_split(x) for x in trainer.model.parameters()) == (stage == 3)
    if stage == 3 and kind == "DPO":
        assert is_split(next(x for name, x in trainer.ref_model.named_parameters() if "lm_head" in name))
    return logged, parameters


@pytest.mark.parametrize(
    ("kind", "stage", "patch"),
    [("DPO", 3, EXACT), ("DPO", 3, ROUTED), ("SFT", 3, EXACT), ("DPO", 2, EXACT)],
)
def test_trl_trains_as_one_process(kind, stage, patch, path, ranks):
    assert_same_training(ranks(2)(on_a_rank, path, kind, stage, patch), *in_one_process(path, kind))


# A patched model


def batch(rank: int, step: int) -> dict:
    """Of another length on every rank."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 300, (2, 8 + 3 * rank), generator=generator)
    labels = ids.clone()
    labels[:, : 3 + rank] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(logps):
    return (logps * torch.linspace(-1.0, 2.0, logps.numel(), dtype=logps.dtype).view(logps.shape)).sum()


def patched_on_a_rank(rank, size, path, stage):
    model = patch_model(AutoModelForCausalLM.from_pretrained(path), backward="exact").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    config = zero(stage, train_micro_batch_size_per_gpu=BATCH // size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    seen = []
    for step in range(2):
        logps = engine(**batch(rank, step), fastdpo=True).logps
        engine.backward(loss_of(logps))
        engine.step()
        seen.append(logps.detach())
    assert all(is_split(x) for x in model.parameters()) == (stage == 3)
    return seen, whole(model)


def patched_in_one_process(path, size):
    """fp64, by log_softmax of the logits."""
    model = AutoModelForCausalLM.from_pretrained(path).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen = []
    for step in range(2):
        parts = []
        for rank in range(size):
            inputs = batch(rank, step)
            labels = inputs["labels"][:, 1:]
            logps = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
            logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
            parts.append(logps)
        (sum(loss_of(x) for x in parts) / size).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append([x.detach() for x in parts])
    return seen, {name: x.detach() for name, x in model.named_parameters()}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_patched_model_trains_as_one_process(stage, path, ranks):
    right_logps, right = patched_in_one_process(path, 2)
    for rank, (logps, parameters) in enumerate(ranks(2)(patched_on_a_rank, path, stage)):
        for step in range(2):
            error = (logps[step] - right_logps[step][rank]).abs().max()
            assert error <= 5e-6 * right_logps[step][rank].abs().max(), (rank, step, error)
        for name in right:
            assert (parameters[name] - right[name]).norm() <= 2e-6 * right[name].norm(), name
