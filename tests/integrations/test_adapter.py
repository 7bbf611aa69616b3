"""Adapters that replace functions too, on the contract of ms-swift 4.6.0: `RLHFTrainerMixin.get_per_token_logps`, which
calls TRL's function of logits by the name it imported (swift/rlhf_trainers/rlhf_mixin.py).
"""

import sys
import types

import pytest
import torch

from fastdpo.integrations.adapter import Adapter
from fastdpo.integrations.trl_methods import FUNCTIONS

SOURCE = """
import torch

def selective_log_softmax(logits, index):
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

class Trainer:
    def __init__(self, model):
        self.model, self.ref_model = model, None

    def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
        loss_mask = labels != label_pad_token_id
        labels = labels.clone()
        labels[~loss_mask] = 0
        reduced = logits.mean(-1) if reduction == "mean" else logits.sum(-1)
        logps = selective_log_softmax(logits, labels)
        logps[~loss_mask] = 0
        reduced[~loss_mask] = 0
        return logps, reduced, loss_mask

    def concatenated_forward(self, model, batch, reduction):
        batch = batch.copy()
        labels = torch.roll(batch.pop("labels"), shifts=-1, dims=1)
        return self.get_per_token_logps(model(**batch, use_cache=False).logits, labels, reduction=reduction)
"""


@pytest.fixture
def module(monkeypatch):
    module = types.ModuleType("trainer_of_a_package")
    exec(SOURCE, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def adapter():
    name = "trainer_of_a_package"
    functions = {"selective_log_softmax": FUNCTIONS["selective_log_softmax"]}
    return Adapter("package", {name: ("Trainer.concatenated_forward",)}, {name: functions})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parity(reduction, module, adapter, tiny_llama, monkeypatch):
    model = tiny_llama()
    labels = (torch.arange(40).view(4, 10) * 7 % 500).masked_fill(torch.arange(10) < 3, -100)
    before = module.selective_log_softmax, module.Trainer.concatenated_forward
    trainer = module.Trainer(model)

    def step():
        batch = {"input_ids": labels.clamp(min=1), "labels": labels}
        logps, reduced, mask = trainer.concatenated_forward(model, batch, reduction)
        model.zero_grad()
        logps.square().mean().backward()
        return logps, reduced, mask, model.lm_head.weight.grad.clone()

    theirs = step()
    adapter.patch()
    adapter.patch(backward="exact")
    multiplied, linear = [], torch.nn.functional.linear
    spy = lambda x, w, b=None: (multiplied.append(len(w)), linear(x, w, b))[1]  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    torch.testing.assert_close(step(), theirs, rtol=1e-4, atol=1e-4)
    assert multiplied and 512 not in multiplied  # the head, never as logits
    adapter.unpatch()
    assert module.selective_log_softmax is before[0] and module.Trainer.concatenated_forward is before[1]


def test_a_missing_function_is_refused(module, adapter, monkeypatch):
    before = module.Trainer.concatenated_forward
    monkeypatch.delattr(module, "selective_log_softmax")
    with pytest.raises(RuntimeError, match="selective_log_softmax"):
        adapter.patch()
    assert module.Trainer.concatenated_forward is before
