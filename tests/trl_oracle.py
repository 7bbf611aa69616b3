"""TRL's own loss code, run on token log-probs of our choosing: no model, no dataset, no copy of a formula."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)


class _Model(torch.nn.Module):
    """Answers every call with the same log-probs."""

    is_gradient_checkpointing = False

    def __init__(self, logps, log_sum_sq_probs=None):
        super().__init__()
        zeros = torch.zeros_like(logps)
        self.output = FusedCausalLMOutput(
            log_probs=logps,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=log_sum_sq_probs,
        )

    def forward(self, **inputs):
        return self.output


def _default(name):
    field = DPOConfig.__dataclass_fields__[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def dpo_loss(logps, ref_logps, mask, log_sum_sq_probs=None, **config):
    """`DPOTrainer._compute_loss` for [2B, T] token log-probs that are zero outside `mask`.

    Returns the loss and what the trainer logs.
    """
    names = (
        "beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing",
        "use_weighting", "discopop_tau",
    )  # fmt: skip
    config = {name: _default(name) for name in names} | config
    losses = config.pop("loss_type", "sigmoid")
    losses = [losses] if isinstance(losses, str) else losses
    trainer = SimpleNamespace(
        model=_Model(logps, log_sum_sq_probs),
        ref_model=_Model(ref_logps),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=config["discopop_tau"]),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        loss_types=losses,
        loss_weights=config.pop("loss_weights", None) or [1.0] * len(losses),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **config,
    )
    # labels are the next tokens: the trainer drops the first column of its mask
    completion_mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    loss = DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def kto_loss(logps, ref_logps, mask, kl, beta, desirable_weight, undesirable_weight):
    """`KTOTrainer._compute_loss`, the first half of the rows desirable: the trainer's mean."""
    from trl.trainer.kto_trainer import KTOTrainer

    half = logps.shape[0] // 2
    trainer = SimpleNamespace(
        model=_Model(logps),
        ref_model=_Model(ref_logps),
        accelerator=ACCELERATOR,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    offset = {id(trainer.model): kl, id(trainer.ref_model): 0.0}
    trainer._compute_kl_logps = lambda model, batch: torch.full((2 * half,), offset[id(model)], dtype=logps.dtype)
    completion_mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "label": torch.arange(2 * half) < half,
    }
    return KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def cpo_losses(chosen, rejected, **config):
    from trl.experimental.cpo import CPOTrainer

    defaults = {"alpha": 0.0, "beta": 0.1, "simpo_gamma": 0.5, "label_smoothing": 0.0, "loss_type": "sigmoid"}
    trainer = SimpleNamespace(accelerator=ACCELERATOR, **(defaults | config))
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)


def orpo_losses(chosen, rejected, beta):
    """The trainer subtracts these from the negative log-likelihood."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=beta)
    return ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
