"""TRL's trainers on a rank of several, under accelerate, and in one process with all of the ranks' data."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl_runs import build_tokenizer, classes, metrics, preferences, texts

from fastdpo.integrations import patch_trl, unpatch_trl

BATCH = 4  # of all ranks
DATA = {"DPO": preferences, "SFT": texts}


def save_model(path: Path, build) -> str:
    """`build()` and a tokenizer, as users have them on disk."""
    build().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def train(path: str, kind: str, size: int, patch: dict | None, prepare=None, parameters=None, **config):
    """Three steps on this rank: (metrics of each step, parameters, trainer).

    patch: options of patch_trl; None for TRL alone. prepare: is given the trainer's models, and its result is the
    trainer's. parameters: of the trainer, name -> whole tensor.
    """
    config_class, trainer_class = classes(kind)
    args = config_class(
        output_dir=os.path.join(path, "run"),
        max_steps=3,
        logging_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",  # Adam's steps are of one length, whatever a gradient is multiplied by
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=3,
        per_device_train_batch_size=BATCH // size,
        **config,
    )
    if args.fsdp or args.deepspeed:
        _as_on_accelerators()
    set_seed(3)
    models = [AutoModelForCausalLM.from_pretrained(path) for _ in range(2 if kind == "DPO" else 1)]
    unpatch_trl()
    if patch is not None:
        patch_trl(**patch)
    try:
        for model in models:
            if prepare is not None:
                prepare(model)
        reference = {"ref_model": models[1]} if kind == "DPO" else {}
        trainer = trainer_class(
            model=models[0],
            args=args,
            train_dataset=DATA[kind](),
            processing_class=AutoTokenizer.from_pretrained(path),
            **reference,
        )
        trainer.train()
    finally:
        unpatch_trl()
    return metrics(trainer), (parameters or whole)(trainer), trainer


def _as_on_accelerators() -> None:
    """Lets accelerate use what it leaves out on CPUs, silently: FSDP and DeepSpeed."""
    from accelerate import DistributedType, PartialState

    os.environ.pop("ACCELERATE_USE_CPU", None)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(trainer) -> dict[str, torch.Tensor]:
    named = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in trainer.model.named_parameters()}
    return {name: x.detach().clone() for name, x in named.items()}


def assert_same_training(results, expected, start: dict[str, torch.Tensor]) -> None:
    """`results` of ranks and `expected` of one process, ``(metrics, parameters)``, from the parameters `start`."""
    (logged, trained), *_ = [result[:2] for result in results]
    right_logged, right = expected[:2]
    assert len(logged) == len(right_logged) == 3
    for mine, other in zip(logged, right_logged):
        for name in other.keys() - {"grad_norm"}:
            if name.endswith("rewards/accuracies") and abs(other["rewards/margins"]) < 1e-4:
                continue  # policy and reference are still the same model: rounding decides who wins
            assert abs(mine[name] - other[name]) <= 5e-6 * max(1.0, abs(other[name])), (name, mine[name], other[name])
    assert trained.keys() == right.keys()
    for name in right:
        error = (trained[name] - right[name]).norm() / (right[name] - start[name]).norm()
        assert error < 1e-4, (name, error)  # of how far it was moved, which for a norm is 1% of it
    for _, others, *_ in results[1:]:
        assert all(torch.equal(others[name], trained[name]) for name in trained)
