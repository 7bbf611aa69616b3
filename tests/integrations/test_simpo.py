"""The contract of princeton-nlp/SimPO, scripts/simpo_trainer.py at 15c4ff89188e81a921e58377e2c988c173e60764:
`SimPOTrainer.get_batch_logps`, `concatenated_forward`, and the cross entropy of `get_batch_loss_metrics`.
"""

import pytest
import torch
from cloned_repositories import (
    B,
    Trainer,
    check_another_version_is_refused,
    check_split_heads_are_refused,
    check_the_documented_lines,
    place,
    token_logps,
)
from torch import nn
from torch.nn import functional as F


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


CLASSES = (SimPOTrainer,)
RUNS = [(SimPOTrainer, "simpo")]


@pytest.fixture(autouse=True)
def clone(monkeypatch):
    place(monkeypatch, "simpo_trainer", *CLASSES)


@pytest.fixture
def models(tiny_llama):
    return lambda: (tiny_llama(), tiny_llama(1))


@pytest.mark.parametrize(("owner", "loss"), RUNS)
def test_the_documented_lines(owner, loss, models, monkeypatch):
    check_the_documented_lines("simpo", owner, loss, models, monkeypatch)


def test_another_version_is_refused(monkeypatch):
    check_another_version_is_refused("simpo", CLASSES, "concatenated_forward", monkeypatch)


@pytest.mark.parametrize(("owner", "loss"), RUNS)
def test_split_heads_are_refused(owner, loss, models):
    check_split_heads_are_refused("simpo", owner, loss, models)
