"""What lazy logits are made of, changed between the forward, the read and the backward."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lazy_models import H, Model, T, V, inputs, lazily, picked
from torch import nn

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.source import Held


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("watch", [
    lambda z: z.retain_grad(), lambda z: z.register_hook(print), lambda z: z.grad_fn,
    lambda z: torch.autograd.grad(z.sum(), z, allow_unused=True),
])  # fmt: skip
def test_gradients_that_would_pass_a_hook_are_refused(watch):
    model, (hidden, labels) = Model(), inputs()
    z = lazily(model, hidden)
    logps = picked(z, labels)
    with pytest.raises(RuntimeError, match="computed without them"):
        watch(z)
    z = lazily(model, hidden)
    scaled = z * 2
    z.retain_grad()
    with pytest.raises(RuntimeError, match="computed without them"):
        picked(scaled, labels)
    assert picked(z, labels).requires_grad and logps.requires_grad


def step(model, hidden):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(hidden).square().sum().backward()
    optimizer.step()


def swap_data(model, hidden):
    model.head.weight.data = torch.randn(V, H)


def replace_parameter(model, hidden):
    model.head.weight = nn.Parameter(torch.randn(V, H))


def shrink(model, hidden):
    model.head.weight.untyped_storage().resize_(0)


def other_state(assign):
    return lambda model, hidden: model.load_state_dict(Model().state_dict(), assign=assign)


WEIGHTS = {
    "in place": lambda model, hidden: model.head.weight.detach().mul_(1.1),
    "a row": lambda model, hidden: model.head.weight.detach()[3].zero_(),
    "bias": lambda model, hidden: model.head.bias.detach().add_(0.1),
    "hidden": lambda model, hidden: hidden.detach().mul_(2),
    "hidden's data": lambda model, hidden: hidden.data.mul_(2),
    "data in place": lambda model, hidden: model.head.weight.data.mul_(1.1),
    "bias's data": lambda model, hidden: model.head.bias.data[V // 2].add_(0.1),
    "a row's data": lambda model, hidden: model.head.weight.data[7].mul_(1.01),
    "step": step,
    "load_state_dict": other_state(False),
    "load_state_dict, assign": other_state(True),
    "data swapped": swap_data,
    "parameter replaced": replace_parameter,
    "storage released": shrink,
}


AS_IT_WAS = ("load_state_dict, assign", "data swapped", "parameter replaced")  # the old tensors are still there


READS = {
    "log-probs": picked,
    "loss": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "mean": lambda z, y: z.mean(-1),
    "entropy": lambda z, y: z.entropy(),
    "accuracy": lambda z, y: z.argmax(-1) == y,
    "logits": lambda z, y: z + 0,
    "part": lambda z, y: picked(z[:, :-1] * 2, y[:, 1:]),
}


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_weights_changed_before_the_read(change, read, mode):
    torch.manual_seed(0)
    model, (hidden, labels) = Model(), inputs()
    with mode():
        hidden = hidden.clone()
        z = lazily(model, hidden)
        expected = READS[read](lazily(model, hidden), labels)
    with torch.inference_mode() if "hidden" in change and mode is torch.inference_mode else torch.no_grad():
        with torch.enable_grad() if change == "step" else torch.no_grad():
            WEIGHTS[change](model, hidden.clone() if change == "step" else hidden)
    if change in AS_IT_WAS or (mode is torch.inference_mode and "hidden" in change):
        torch.testing.assert_close(READS[read](z, labels), expected)
    else:
        with pytest.raises(RuntimeError, match="has been changed since the forward"):
            READS[read](z, labels)


@pytest.mark.filterwarnings("ignore:.*needs the logits themselves")
@pytest.mark.parametrize("read", ["log-probs", "loss", "logits"])
@pytest.mark.parametrize("change", ["in place", "hidden", "step", "load_state_dict"])
def test_weights_changed_before_the_backward(change, read):
    model, (hidden, labels) = Model(), inputs()
    leaf = hidden.clone().requires_grad_()
    hidden = leaf * 1
    expected = READS[read](model(hidden), labels)
    value = READS[read](lazily(model, hidden), labels)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    with torch.enable_grad() if change == "step" else torch.no_grad():
        WEIGHTS[change](model, leaf.detach().clone() if change == "step" else hidden)
    if read == "logits" and change == "hidden":
        return  # they were made of a copy of it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_merged_adapter():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    ids = torch.randint(V, (2, T))
    for change in (model.merge_adapter, model.unmerge_adapter):
        with lazy_logits(model):
            z, later = (model(ids).logits for _ in range(2))
        picked(z, ids)
        change()
        with pytest.raises(RuntimeError, match="weight of the lm_head has been changed"):
            picked(later, ids)


def test_where_finding_out_would_wait_a_change_gives_nan(monkeypatch):
    model, (hidden, labels) = Model(), inputs()
    monkeypatch.setattr(Held, "valid", lambda self: torch.tensor(torch.nan))
    for read in READS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = read(lazily(model, hidden), labels)
        assert value.dtype == torch.bool or value.isnan().all()
