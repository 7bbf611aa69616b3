"""The contract of eric-mitchell/direct-preference-optimization, trainers.py at
5815fab23a10509b7ee7088be27f8979bd26c96a:
`_get_batch_logps`, `BasicTrainer.concatenated_forward`, `get_batch_metrics`.
"""

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


class BasicTrainer(Trainer):
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


CLASSES = (BasicTrainer,)
RUNS = [(BasicTrainer, "dpo"), (BasicTrainer, "sft")]


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    place(monkeypatch, "trainers", *CLASSES)


@pytest.fixture
def models(tiny_llama):
    return lambda: (tiny_llama(), tiny_llama(1))


@pytest.mark.parametrize(("owner", "loss"), RUNS)
def test_the_documented_lines(owner, loss, models, monkeypatch):
    check_the_documented_lines("direct_preference_optimization", owner, loss, models, monkeypatch)


def test_another_version_is_refused(monkeypatch):
    check_another_version_is_refused("direct_preference_optimization", CLASSES, "get_batch_metrics", monkeypatch)


@pytest.mark.parametrize(("owner", "loss"), RUNS)
def test_split_heads_are_refused(owner, loss, models):
    check_split_heads_are_refused("direct_preference_optimization", owner, loss, models)
