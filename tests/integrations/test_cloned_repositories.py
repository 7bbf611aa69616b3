"""The adapters of repositories that users clone, against their contracts: what they do to logits, and the lines that
the README tells users to add, run as they stand there.

eric-mitchell/direct-preference-optimization, trainers.py at 5815fab23a10509b7ee7088be27f8979bd26c96a:
`_get_batch_logps`, `BasicTrainer.concatenated_forward`, `get_batch_metrics`.
ContextualAI/HALOs, train/trainers.py at 031a5245d8068a9cf72aab8d9a778c152c9f5554: `BasicTrainer.get_batch_logps`,
`PairedPreferenceTrainer.forward`, and the `forward` of the unpaired trainers.
princeton-nlp/SimPO, scripts/simpo_trainer.py at 15c4ff89188e81a921e58377e2c988c173e60764:
`SimPOTrainer.get_batch_logps`, `concatenated_forward`, and the cross entropy of `get_batch_loss_metrics`.
"""

import contextlib
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

README = Path(__file__).resolve().parents[2] / "README.md"
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


class OriginalTrainer(Trainer):
    def concatenated_forward(self, model, batch):
        ids, mask, labels = batch
        all_logits = model(ids, attention_mask=mask).logits.to(torch.float32)
        all_logps = token_logps(all_logits, labels)[0].sum(-1)
        return all_logps[:B], all_logps[B:]

    def get_batch_metrics(self, batch, loss_config=None, train=True):
        if self.loss_name == "sft":
            ids, mask, labels = (x[:B] for x in batch)
            logits = self.policy(ids, attention_mask=mask).logits.to(torch.float32)
            losses, metrics = -token_logps(logits, labels)[0].sum(-1), {}
        else:
            policy = self.concatenated_forward(self.policy, batch)
            with torch.no_grad():
                reference = self.concatenated_forward(self.reference_model, batch)
            losses, metrics = dpo_loss(policy, reference)
        return losses.mean(), metrics


class HalosTrainer(Trainer):
    policy_dtype = torch.float32

    def get_batch_logps(self, logits, labels):
        return token_logps(logits.float(), labels)[0]

    def run(self, model, batch):
        ids, mask, labels = batch
        with contextlib.nullcontext():  # accelerator.autocast()
            all_logits = model(ids, attention_mask=mask).logits.to(self.policy_dtype)
            return self.get_batch_logps(all_logits, labels)

    def get_batch_metrics(self, batch, mode=None):
        policy = self.forward(self.policy, batch)
        with torch.no_grad():
            reference = self.forward(self.reference_model, batch)
        losses, metrics = dpo_loss(*([x.sum(-1) for x in logps[:2]] for logps in (policy, reference)))
        return losses.mean(), metrics


class PairedPreferenceTrainer(HalosTrainer):
    def forward(self, model, batch):
        all_logps = self.run(model, batch)
        return all_logps[:B, ...], all_logps[B:, ...]


class UnpairedPreferenceTrainer(HalosTrainer):
    def forward(self, model, batch):
        all_logps = self.run(model, batch)
        return all_logps[[0, 2], ...], all_logps[[1, 3], ...]


class KTOTrainer(HalosTrainer):
    def forward(self, model, batch):
        with torch.no_grad():
            kl_logps = self.run(model, [x.flip(0) for x in batch])
        all_logps = self.run(model, batch)
        return all_logps[[0, 2], ...], all_logps[[1, 3], ...], kl_logps


class SFTTrainer(HalosTrainer):
    def get_batch_metrics(self, batch, mode=None):
        logps = self.run(self.policy, batch).view(-1)
        return -logps.mean(), {"tokens": (logps != 0).sum()}


class SimPOTrainer(Trainer):
    def concatenated_forward(self, model, batch):
        ids, mask, labels = batch
        all_logits = model(ids, attention_mask=mask, use_cache=False).logits
        logps, loss_mask = token_logps(all_logits, labels)
        all_logps = logps.sum(-1) / loss_mask.sum(-1)
        return all_logps[:B], all_logps[B:], all_logits[:B], all_logits[B:], labels[:B]

    def get_batch_metrics(self, batch):
        chosen, rejected, chosen_logits, rejected_logits, labels = self.concatenated_forward(self.policy, batch)
        loss = -F.logsigmoid(2.0 * (chosen - rejected - 0.3)).mean()
        shifted = chosen_logits[..., :-1, :].contiguous()
        sft = nn.CrossEntropyLoss()(shifted.view(-1, shifted.shape[-1]), labels[..., 1:].clone().view(-1))
        means = [x.detach().mean().cpu() for x in (shifted, rejected_logits)]
        return loss + 0.5 * sft, {"sft": sft.detach(), "means": torch.stack(means)}


# Adapter -> (module of the repository, its class there, what the adapter wraps, the losses it has)
REPOSITORIES = {
    "direct_preference_optimization": ("trainers", {"BasicTrainer": OriginalTrainer}, "get_batch_metrics"),
    "halos": (
        "train.trainers",
        {x.__name__: x for x in (SFTTrainer, PairedPreferenceTrainer, UnpairedPreferenceTrainer, KTOTrainer)},
        "forward",
    ),
    "simpo": ("simpo_trainer", {"SimPOTrainer": SimPOTrainer}, "concatenated_forward"),
}
RUNS = [
    ("direct_preference_optimization", "BasicTrainer", "dpo"),
    ("direct_preference_optimization", "BasicTrainer", "sft"),
    *(("halos", name, "dpo") for name in REPOSITORIES["halos"][1]),
    ("simpo", "SimPOTrainer", "simpo"),
]


@pytest.fixture
def clone(monkeypatch):
    """Puts the repository's module where its own scripts import it from."""

    def place(adapter):
        name, classes, _ = REPOSITORIES[adapter]
        module = types.ModuleType(name)
        vars(module).update(classes)
        for parent in [name.rpartition(".")[0]] if "." in name else []:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
        return classes

    return place


def documented(adapter):
    """The two lines of the README that name `adapter`."""
    pattern = rf"^from fastdpo\.integrations import {adapter}\n+{adapter}\.patch\(.*$"
    (lines,) = re.findall(pattern, README.read_text(), re.MULTILINE)
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


@pytest.mark.parametrize(("adapter", "name", "loss"), RUNS)
def test_the_documented_lines(adapter, name, loss, clone, tiny_llama, monkeypatch):
    classes = clone(adapter)
    owner = classes[name]
    theirs = train(owner(tiny_llama(), tiny_llama(1), loss))
    before = {cls: dict(vars(cls)) for cls in classes.values()}
    trainer = owner(tiny_llama(), tiny_llama(1), loss)  # made before patching
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
    assert all(vars(cls)[key] is value for cls, old in before.items() for key, value in old.items())


@pytest.mark.parametrize("adapter", REPOSITORIES)
def test_another_version_is_refused(adapter, clone, monkeypatch):
    classes = clone(adapter)
    *others, last = classes.values()
    before = [dict(vars(cls)) for cls in others]
    monkeypatch.delattr(last, REPOSITORIES[adapter][2])
    with pytest.raises(RuntimeError, match=REPOSITORIES[adapter][2]):
        importlib.import_module(f"fastdpo.integrations.{adapter}").patch()
    assert [dict(vars(cls)) for cls in others] == before


@pytest.mark.parametrize(("adapter", "name", "loss"), RUNS)
def test_split_heads_are_refused(adapter, name, loss, clone, tiny_llama):
    """As under the repositories' FSDP trainers: an error, and not other numbers."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    classes = clone(adapter)
    module = importlib.import_module(f"fastdpo.integrations.{adapter}")
    module.patch()
    try:
        trainer = classes[name](*(FullyShardedDataParallel(tiny_llama(seed)) for seed in (0, 1)), loss)
        with pytest.raises(NotImplementedError, match="FullyShardedDataParallel"):
            trainer.get_batch_metrics(batch(0))
    finally:
        module.unpatch()
