"""patch_trl on ranks with different data: TRL's trainers under accelerate train as one process with all of the data."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("trl", minversion="1.16")

from transformers import AutoModelForCausalLM
from trl.models.utils import _ForwardRedirection
from trl.trainer import utils as trl_utils
from trl.trainer.distillation_trainer import DistillationTrainer
from trl_ranks import assert_same_training, save_model, train
from trl_runs import teacher

from fastdpo.integrations import patch_trl, unpatch_trl

FSDP2 = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
EXACT, ROUTED = {"backward": "exact"}, {"backward": "routed", "tau": 0.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return {}, tmp_path_factory


@pytest.fixture
def model_path(path, tiny_llama):
    """path(tied): of a model on disk, made once."""
    made, factory = path

    def of(tied: bool = False) -> str:
        def build():
            model = tiny_llama()
            if tied:
                model.config.tie_word_embeddings = True
                model.tie_weights()
            return model

        if tied not in made:
            made[tied] = save_model(factory.mktemp("model"), build)
        return made[tied]

    return of


@functools.cache
def in_one_process(path: str, kind: str):
    """By TRL alone."""
    start = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    return train(path, kind, 1, None)[:2], {name: x.detach() for name, x in start.items()}


def own_group(keep: bool):
    return lambda model: fully_shard(model.lm_head, reshard_after_forward=not keep)


def with_norm(model):
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=True)


# What accelerate does not do by itself; it puts the head in a group with the last norm, which stays gathered
PREPARED = {
    "DDP": None,
    "FSDP2": None,
    "FSDP2, head alone": own_group(keep=False),
    "FSDP2, head alone, kept": own_group(keep=True),
    "FSDP2, head with norm, resharded": with_norm,
}


def on_a_rank(rank, size, path, kind, layout, patch):
    config = {} if layout == "DDP" else {"fsdp": True, "fsdp_config": yaml.safe_load(FSDP2.read_text())["fsdp_config"]}
    logged, parameters, trainer = train(path, kind, size, patch, PREPARED[layout], **config)
    if layout != "DDP":
        assert isinstance(trainer.model, FSDPModule) and isinstance(trainer.model.model.layers[0], FSDPModule)
        assert all(isinstance(x, DTensor) and x.to_local().numel() < x.numel() for x in trainer.model.parameters())
        assert kind == "SFT" or isinstance(trainer.ref_model, FSDPModule)
    if layout == "DDP":
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return logged, parameters


@pytest.mark.parametrize(
    ("layout", "patch", "kind", "tied"),
    [
        ("DDP", EXACT, "DPO", False),
        ("DDP", ROUTED, "DPO", False),
        ("FSDP2", EXACT, "DPO", False),
        ("FSDP2", ROUTED, "DPO", False),
        ("FSDP2", EXACT, "DPO", True),
        ("FSDP2, head alone", EXACT, "DPO", False),
        ("FSDP2, head alone", ROUTED, "SFT", False),
        ("FSDP2, head alone, kept", ROUTED, "DPO", False),
        ("FSDP2, head with norm, resharded", EXACT, "DPO", False),
    ],
)
def test_ranks_train_as_one_process(layout, patch, kind, tied, model_path, ranks):
    path = model_path(tied)
    assert_same_training(ranks(2)(on_a_rank, path, kind, layout, patch), *in_one_process(path, kind))


def made_before_patching(rank, size, path):
    model = AutoModelForCausalLM.from_pretrained(path)
    trl_utils.add_fused_lm_head(model)
    fully_shard(model.lm_head)
    fully_shard(model)
    patch_trl(backward="exact")
    try:
        ids = torch.arange(5, 17)[None] + rank
        with torch.no_grad():  # nothing to reduce
            assert model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.isfinite().all()
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    finally:
        unpatch_trl()


def test_a_split_head_of_a_trainer_made_before_patching_is_refused(model_path, ranks):
    for error in ranks(2).errors(made_before_patching, model_path()):
        assert error.kind == "NotImplementedError" and "call patch_trl first" in str(error)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def around_the_wrapper(rank, size, path):
    patch_trl(backward="exact")
    try:
        model = AutoModelForCausalLM.from_pretrained(path)
        trl_utils.add_fused_lm_head(model)
        outer = fully_shard(Outer(model), reshard_after_forward=True)
        ids = torch.arange(5, 17)[None] + rank
        outer(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
        outer.inner(input_ids=ids, labels=ids, fused_lm_head=True)
    finally:
        unpatch_trl()


def test_a_head_that_nobody_has_gathered_is_refused(model_path, ranks):
    for error in ranks(2).errors(around_the_wrapper, model_path()):
        assert error.kind == "NotImplementedError" and "not gathered" in str(error)


def in_tensor_parallel(rank, size, path, split):
    patch_trl(backward="exact")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **({"tp_plan": "auto"} if split else {}))
        trl_utils.add_fused_lm_head(model)
        assert isinstance(model.lm_head.weight, DTensor) == split
        ids = torch.arange(5, 29).view(2, 12)  # the same on every rank
        outputs = model(input_ids=ids, labels=ids, fused_lm_head=True)
        outputs.loss.backward()
        grad = model.lm_head.weight.grad
        return outputs.log_probs.detach(), grad.full_tensor() if split else grad
    finally:
        unpatch_trl()


def test_tensor_parallel(model_path, ranks):
    logps, grad = in_tensor_parallel(0, 1, model_path(), False)
    for mine, my_grad in ranks(2)(in_tensor_parallel, model_path(), True):
        torch.testing.assert_close(mine, logps, rtol=2e-6, atol=2e-6)
        assert (my_grad - grad).norm() <= 2e-6 * grad.norm()


def distilled(rank, size, path, layout, patch):
    """(loss, gradients) of TRL's own `_compute_loss` of this rank's rows."""
    trainer = object.__new__(DistillationTrainer)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False)
    trainer._forward_redirection, trainer.model_kwarg_keys = _ForwardRedirection(), set()
    trainer.beta, trainer.temperature, trainer._is_vlm = 0.3, 0.8, False
    model, trainer.teacher_model = AutoModelForCausalLM.from_pretrained(path), teacher()
    if patch is not None:
        patch_trl(**patch)
    try:
        if layout is not None:
            for each in (model, trainer.teacher_model):
                if PREPARED[layout] is not None:
                    PREPARED[layout](each)
                fully_shard(each)
        rows = 4 // size
        ids = torch.arange(5, 69).view(4, 16)[rank * rows : (rank + 1) * rows] * 7 % 500
        mask = torch.ones_like(ids[:, 6:])
        mask[0, 4:] = 0
        inputs = {"prompt_ids": ids[:, :6], "completion_ids": ids[:, 6:]}
        inputs |= {"prompt_mask": torch.ones_like(ids[:, :6]), "completion_mask": mask}
        redirect = trainer._forward_redirection
        loss, _, _ = redirect(model, model, trainer._compute_loss, model, inputs, 40 / size)
        loss.backward()
    finally:
        unpatch_trl()
    grads = {name: x.grad.full_tensor() if layout else x.grad for name, x in model.named_parameters()}
    return loss.detach(), grads


@pytest.mark.parametrize(
    "layout", ["FSDP2", "FSDP2, head alone", "FSDP2, head alone, kept", "FSDP2, head with norm, resharded"]
)
def test_ranks_distil_as_one_process(layout, model_path, ranks):
    wholes = [distilled(rank, 2, model_path(), None, None) for rank in range(2)]  # by TRL alone
    found = ranks(2)(distilled, model_path(), layout, EXACT)
    for (loss, grads), (right, _) in zip(found, wholes):
        torch.testing.assert_close(loss, right, rtol=2e-5, atol=1e-6)
        for name, grad in grads.items():
            right = (wholes[0][1][name] + wholes[1][1][name]) / 2
            assert (grad - right).norm() <= 2e-5 * right.norm(), name
