"""The adapter against the contract of LLaMA-Factory 0.9.5: `concatenated_forward` and `get_batch_logps`, reduced to
what they do to logits (train/dpo/trainer.py, train/trainer_utils.py).
"""

import sys
import types

import pytest
import torch
from torch import nn

from fastdpo.integrations import llamafactory


def get_batch_logps(logits, labels):
    labels = labels[:, 1:].clone()
    logits = logits[:, :-1, :]
    loss_mask = labels != -100
    labels[labels == -100] = 0
    logps = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (logps * loss_mask).sum(-1), loss_mask.sum(-1)


class CustomDPOTrainer:
    def __init__(self, model):
        self.model, self.ref_model = model, None

    def concatenated_forward(self, model, batch, is_ref_model=False):
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        logps, length = get_batch_logps(logits, labels)
        chosen, _ = logits.split(len(labels) // 2, dim=0)
        return logps, length, chosen.detach().mean()


class CustomKTOTrainer(CustomDPOTrainer):
    def forward(self, model, batch, prefix=""):
        return self.concatenated_forward(model, batch)


@pytest.fixture
def package(monkeypatch):
    for name, owner in (("dpo", CustomDPOTrainer), ("kto", CustomKTOTrainer)):
        module = types.ModuleType(f"llamafactory.train.{name}.trainer")
        setattr(module, owner.__name__, owner)
        for parent in ("llamafactory", "llamafactory.train", f"llamafactory.train.{name}"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_one_call(package, tiny_llama, monkeypatch):
    model = tiny_llama()
    original = CustomDPOTrainer.concatenated_forward

    def step():
        labels = (torch.arange(40).view(4, 10) % 30).masked_fill(torch.arange(10) < 3, -100)
        batch = {"input_ids": labels.clamp(min=0), "labels": labels}
        values = trainer.concatenated_forward(model, batch)
        model.zero_grad()
        values[0].square().mean().backward()
        return *values, model.lm_head.weight.grad.clone()

    trainer = CustomDPOTrainer(model)  # made before patching
    theirs = step()
    with pytest.raises(TypeError, match="backwards"):
        llamafactory.patch(backwards="exact")
    llamafactory.patch()
    llamafactory.patch(backward="exact")
    multiplied = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (multiplied.append(len(w)), linear(x, w, b))[1])
    ours = step()
    assert 512 not in multiplied  # the head, never as logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    llamafactory.unpatch()
    assert CustomDPOTrainer.concatenated_forward is original


def test_another_release_is_refused(package, monkeypatch):
    monkeypatch.delattr(CustomKTOTrainer, "forward")
    before = CustomDPOTrainer.concatenated_forward
    with pytest.raises(RuntimeError, match="'forward'"):
        llamafactory.patch()
    assert CustomDPOTrainer.concatenated_forward is before
