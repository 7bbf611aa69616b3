"""Lazy logits in torchtune's DPO recipe: the line that docs/trainers.md adds to it, in the recipe itself where it is
installed, and otherwise in its contract.

Last run with torchtune 0.6.1, torchao 0.10.0, torch 2.13.0 on the CPU: its `LoRADPORecipeSingleDevice.train`, with a
model, data and a logger of the test's own in place of what `setup` reads from files. The contract is
recipes/lora_dpo_single_device.py (`concatenated_forward`, the metrics of `train`),
torchtune/rlhf/sequence_processing.py (`get_batch_log_probs`), torchtune/modules/transformer.py
(`TransformerDecoder.unembed`) and tied_linear.py (`TiedLinear`, no module) of 0.6.1. Recipes cannot be imported:
`tune run` runs their files, and `tune cp` copies them to be edited.
"""

import contextlib
import importlib.util
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdpo.integrations import lazy_logits

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "trainers.md"
TORCHTUNE = importlib.util.find_spec("torchtune")
V = 512


class Linear(nn.Module):
    __module__ = "torchtune.modules.tied_linear"

    def forward(self, x, weight):
        return F.linear(x, weight)


class TiedLinear:
    __module__ = "torchtune.modules.tied_linear"

    def __init__(self, tied_module):
        self.tied_module, self.linear = tied_module, Linear()

    def __call__(self, x):
        return self.linear(x, self.tied_module.weight)


class TransformerDecoder(nn.Module):
    __module__ = "torchtune.modules.transformer"

    def __init__(self, tied):
        super().__init__()
        self.tok_embeddings, self.norm = nn.Embedding(V, 32), nn.RMSNorm(32)
        self.output = TiedLinear(self.tok_embeddings) if tied else nn.Linear(32, V, bias=False)

    def forward(self, tokens):
        return self.output(self.norm(self.tok_embeddings(tokens).cumsum(1))).float()


def get_batch_log_probs(logits, labels):
    labels, logits = labels[:, 1:].clone(), logits[:, :-1, :]
    mask = labels != -100
    labels[labels == -100] = 0
    logps = torch.gather(F.log_softmax(logits / 1.0, dim=-1), 2, labels.unsqueeze(-1)).squeeze(-1)
    return (logps * mask).sum(-1)


@pytest.fixture
def multiplied(monkeypatch):
    """How many rows the weights of `F.linear` had: V is the head, multiplied into logits."""
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: (rows.append(len(w)), linear(x, w, b))[1])
    return rows


def batch(step):
    labels = ((torch.arange(40).view(4, 10) * (step + 3)) % 500 + 3).masked_fill(torch.arange(10) < 3, -100)
    return labels.clamp(min=1), labels.masked_fill(torch.arange(10) >= torch.tensor([[10], [8], [9], [10]]), -100)


@pytest.mark.parametrize("tied", [False, True])
def test_the_contract(tied, multiplied):
    torch.manual_seed(0)
    model = TransformerDecoder(tied)

    def step(context):
        model.zero_grad()
        tokens, labels = batch(0)
        with context:
            logits = model(tokens)
        logps = get_batch_log_probs(logits, labels)
        logps.square().mean().backward()
        means = torch.stack([x.detach().mean() for x in (logits[:2], logits[2:])])
        return logps, means, [p.grad.clone() for p in model.parameters()]

    theirs = step(contextlib.nullcontext())
    multiplied.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = step(lazy_logits(model, backward="exact"))
    assert V not in multiplied
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    head = model.output.linear if tied else model.output
    assert "forward" not in vars(head)


def test_other_heads_are_refused():
    model = TransformerDecoder(False)
    model.output = Linear()  # LoRA on the head is such a module
    with pytest.raises(TypeError, match="Linear"), lazy_logits(model):
        pass

    class FSDPModule(TransformerDecoder):  # what fully_shard makes of a model, in the distributed recipes
        pass

    with pytest.raises(NotImplementedError, match="FSDPModule"), lazy_logits(FSDPModule(False)):
        pass


def documented(source):
    """The recipe with the documented line in the place of its own."""
    (ours,) = re.findall(r"^with (lazy_logits\(model\), self.activations_handling_ctx:)$", DOCUMENT.read_text(), re.M)
    changed = source.replace("with self.activations_handling_ctx:", f"with {ours}")
    assert changed.count("lazy_logits") == 1
    return "from fastdpo.integrations import lazy_logits\n" + changed


@pytest.mark.skipif(TORCHTUNE is None, reason="needs torchtune itself")
@pytest.mark.parametrize("tied", [False, True])
def test_the_recipe(tied, multiplied):
    from torchtune.models.llama3_2 import lora_llama3_2
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.rlhf.loss import DPOLoss
    from trl_runs import largest_difference

    path = Path(TORCHTUNE.origin).parents[1] / "recipes" / "lora_dpo_single_device.py"

    def run(source):
        recipe_module = types.ModuleType("lora_dpo_single_device")
        exec(compile(source, path, "exec"), vars(recipe_module))
        recipe = object.__new__(recipe_module.LoRADPORecipeSingleDevice)
        torch.manual_seed(0)
        model = lora_llama3_2(
            ["q_proj", "v_proj"], True, vocab_size=V, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32,
            max_seq_len=32, intermediate_dim=64, lora_rank=4, lora_alpha=8, tie_word_embeddings=tied,
        )  # fmt: skip
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.2)  # LoRA's B too: policy and reference differ from the start
        set_trainable_params(model, get_adapter_params(model))
        history = []
        vars(recipe).update(
            _model=model,
            _loss_fn=DPOLoss(beta=0.1),
            _optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3),
            _lr_scheduler=None,
            _dataloader=[batch(step) for step in range(10)],
            _sampler=types.SimpleNamespace(set_epoch=lambda epoch: None),
            _metric_logger=types.SimpleNamespace(log_dict=lambda entry, step: history.append(entry)),
            _device=torch.device("cpu"),
            _model_compile=False,
            _gradient_accumulation_steps=1,
            _steps_per_epoch=10,
            _log_every_n_steps=1,
            _log_peak_memory_stats=False,
            activations_handling_ctx=contextlib.nullcontext(),
            epochs_run=0,
            total_epochs=1,
            max_steps_per_epoch=None,
            global_step=0,
            save_checkpoint=lambda epoch: None,
        )
        recipe.train()
        return [{name: float(x) for name, x in entry.items() if "per_second" not in name} for entry in history]

    source = path.read_text()
    theirs = run(source)
    assert multiplied.count(V) == 20 and len(theirs) == 10
    multiplied.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run(documented(source).replace("lazy_logits(model)", 'lazy_logits(model, backward="exact")'))
    assert multiplied and V not in multiplied
    print(f"largest metric difference {largest_difference(ours, theirs):.2g}")
