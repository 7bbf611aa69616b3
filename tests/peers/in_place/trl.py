"""TRL: `patch_trl`, and its function of logits as `selective_log_softmax`."""

from __future__ import annotations

from pathlib import Path

import fastdpo

from . import hub as of_hub

SHAPES: dict[str, str] = {}
COMPARISONS: tuple[str, ...] = ()


def prepare(hub: Path) -> None:
    """Its configurations want bf16, and without a GPU they want to be told that a CPU is meant."""
    of_hub.use(hub)
    import torch
    from transformers import TrainingArguments

    checked = TrainingArguments.__post_init__

    def post_init(self):
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        checked(self)

    TrainingArguments.__post_init__ = post_init


def patch(options: dict) -> None:
    from trl.trainer import utils

    def selective_log_softmax(logits, index):
        return fastdpo.selective_log_softmax(logits, index).to(logits.dtype)

    def entropy_from_logits(logits, chunk_size=128):
        flat = logits.reshape(-1, logits.shape[-1])
        index = flat.new_zeros(len(flat)).long()
        entropy = fastdpo.selective_log_softmax(flat, index, return_entropy=True)[1]
        return entropy.view(logits.shape[:-1]).to(logits.dtype)

    utils.selective_log_softmax = selective_log_softmax
    utils.entropy_from_logits = entropy_from_logits
    fastdpo.patch_trl(**options)
