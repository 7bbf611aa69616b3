"""Trainers of repositories that users clone, in place of the modules that their scripts import; and what is asked of
their adapters: the lines that docs/trainers.md tells users to add, run as they stand there.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "trainers.md"
B, T = 2, 10


def token_logps(logits, labels):
    assert logits.shape[:-1] == labels.shape
    labels, logits = labels[:, 1:].clone(), logits[:, :-1, :]
    mask = labels != -100
    labels[labels == -100] = 0
    return torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2) * mask, mask


def dpo_loss(policy, reference):
    chosen, rejected = (p - r for p, r in zip(policy, reference))
    return -F.logsigmoid(0.1 * (chosen - rejected)), {"margins": (chosen - rejected).detach()}


class Trainer:
    def __init__(self, policy, reference, loss="dpo"):
        self.policy, self.reference_model, self.loss_name = policy, reference, loss


def place(monkeypatch, name: str, *classes: type) -> None:
    """Puts the repository's module where its own scripts import it from."""
    module = types.ModuleType(name)
    vars(module).update({cls.__name__: cls for cls in classes})
    if "." in name:
        parent = name.rpartition(".")[0]
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


def documented(adapter):
    """The two lines of docs/trainers.md that name `adapter`."""
    pattern = rf"^from fastdpo\.integrations import {adapter}\n+{adapter}\.patch\(.*$"
    (lines,) = re.findall(pattern, DOCUMENT.read_text(), re.MULTILINE)
    return lines


def batch(step):
    labels = ((torch.arange(2 * B * T).view(2 * B, T) * (step + 3)) % 500).masked_fill(torch.arange(T) < 3, -100)
    mask = torch.ones_like(labels)
    mask[0, -2:] = 0
    return labels.clamp(min=1), mask, labels.masked_fill(mask == 0, -100)


def train(trainer, steps=10):
    optimizer = torch.optim.AdamW(trainer.policy.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        loss, metrics = trainer.get_batch_metrics(batch(step))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainer.policy.parameters(), 1e9)
        optimizer.step()
        history.append({"loss": loss.detach(), "grad_norm": norm} | metrics)
    return history


def check_the_documented_lines(adapter, owner, loss, models, monkeypatch) -> None:
    """`models()`: policy and reference. Trainers made before patching are reached; nothing of them stays changed."""
    theirs = train(owner(*models(), loss))
    before = dict(vars(owner))
    trainer = owner(*models(), loss)
    exec(documented(adapter), {})
    module = importlib.import_module(f"fastdpo.integrations.{adapter}")
    try:
        with pytest.raises(TypeError, match="backwards"):
            module.patch(backwards="exact")
        module.patch(backward="exact")  # twice
        multiplied, linear = [], F.linear
        monkeypatch.setattr(F, "linear", lambda x, w, b=None: (multiplied.append(len(w)), linear(x, w, b))[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = train(trainer)
        assert multiplied and 512 not in multiplied  # the head, never as logits
        assert all(mine.keys() == other.keys() for mine, other in zip(ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    finally:
        module.unpatch()
    assert all(vars(owner)[key] is value for key, value in before.items())


def check_another_version_is_refused(adapter, classes, method, monkeypatch) -> None:
    *others, last = classes
    before = [dict(vars(cls)) for cls in others]
    monkeypatch.delattr(last, method)
    with pytest.raises(RuntimeError, match=method):
        importlib.import_module(f"fastdpo.integrations.{adapter}").patch()
    assert [dict(vars(cls)) for cls in others] == before


def check_split_heads_are_refused(adapter, owner, loss, models) -> None:
    """As under the repositories' FSDP trainers: an error, and not other numbers."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    module = importlib.import_module(f"fastdpo.integrations.{adapter}")
    module.patch()
    try:
        trainer = owner(*map(FullyShardedDataParallel, models()), loss)
        with pytest.raises(NotImplementedError, match="FullyShardedDataParallel"):
            trainer.get_batch_metrics(batch(0))
    finally:
        module.unpatch()
