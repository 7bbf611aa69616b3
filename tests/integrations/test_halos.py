"""The contract of ContextualAI/HALOs, train/trainers.py at 031a5245d8068a9cf72aab8d9a778c152c9f5554:
`BasicTrainer.get_batch_logps`, `PairedPreferenceTrainer.forward`, and the `forward` of the unpaired trainers.
"""

import contextlib

import pytest
import torch
from cloned_repositories import (
    B,
    Trainer,
    check_another_version_is_refused,
    check_split_heads_are_refused,
    check_the_documented_lines,
    dpo_loss,
    place,
    token_logps,
)


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


CLASSES = (SFTTrainer, PairedPreferenceTrainer, UnpairedPreferenceTrainer, KTOTrainer)
RUNS = [(SFTTrainer, "dpo"), (PairedPreferenceTrainer, "dpo"), (UnpairedPreferenceTrainer, "dpo"), (KTOTrainer, "dpo")]


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    place(monkeypatch, "train.trainers", *CLASSES)


@pytest.fixture
def models(tiny_llama):
    return lambda: (tiny_llama(), tiny_llama(1))


@pytest.mark.parametrize(("owner", "loss"), RUNS)
def test_the_documented_lines(owner, loss, models, monkeypatch):
    check_the_documented_lines("halos", owner, loss, models, monkeypatch)


def test_another_version_is_refused(monkeypatch):
    check_another_version_is_refused("halos", CLASSES, "forward", monkeypatch)


@pytest.mark.parametrize(("owner", "loss"), RUNS)
def test_split_heads_are_refused(owner, loss, models):
    check_split_heads_are_refused("halos", owner, loss, models)
