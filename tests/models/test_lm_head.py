"""patch_model under PEFT: adapters anywhere, on the lm_head, prompts, and what is refused by name."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from causal_models import V, assert_same, batch, build, definition, gradients
from peft import LoraConfig, get_peft_model

from fastdpo.integrations import patch_model, unpatch_model
from fastdpo.models.lm_head import applied_head

EVERYWHERE = {"target_modules": "all-linear"}
ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED_HEAD = {"modules_to_save": ["lm_head"]}


def lora(**options) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options))


def randomise(model):
    """Adapters start as no change: give them one."""
    marks = ("lora_B", "modules_to_save", "trainable_tokens_delta", "lora_magnitude_vector")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in marks):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def wrapped(model, config):
    torch.manual_seed(3)
    return randomise(get_peft_model(model, config).eval())


def logps(model):
    with torch.no_grad():
        return model(**batch(), fastdpo=True).logps


CASES = {
    "attention": ("llama", {}),
    "all": ("llama", EVERYWHERE),
    "head": ("llama", ON_HEAD),
    "head with bias": ("phi (bias)", {"target_modules": ["q_proj", "lm_head"]}),
    "head, rsLoRA": ("llama", ON_HEAD | {"use_rslora": True}),
    "head, bias of B": ("phi (bias)", ON_HEAD | {"lora_bias": True}),
    "head, bias of B alone": ("llama", ON_HEAD | {"lora_bias": True}),
    "head, softcap": ("gemma2 (softcap)", ON_HEAD),
    "head, dropout in evaluation": ("llama", ON_HEAD | {"lora_dropout": 0.5}),
    "saved head": ("llama", SAVED_HEAD),
    "saved head, tied": ("llama tied", SAVED_HEAD),
    "DoRA inside": ("llama", {"use_dora": True}),
    "DoRA on the head": ("llama", ON_HEAD | {"use_dora": True}),
    "DoRA on a head with bias": ("phi (bias)", ON_HEAD | {"use_dora": True}),
    "tokens of the embedding": ("llama", {"trainable_token_indices": [5, 6]}),
    "tokens, tied": ("llama tied", {"trainable_token_indices": [5, 6]}),
    "tokens of the head": ("llama", {"trainable_token_indices": {"lm_head": [5, 6]}}),
    "tokens of a head with bias": ("phi (bias)", {"trainable_token_indices": {"lm_head": [5, 6]}}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["patch first", "wrap first"])
def test_adapters(case, order):
    """Log-probs, and the gradient of every adapter parameter, against those through the model's own logits."""
    name, options = CASES[case]
    model = build(name)
    if order == "patch first":
        patch_model(model, backward="exact")
        model = wrapped(model, lora(**options))
    else:
        model = wrapped(model, lora(**options))
        assert patch_model(model, backward="exact") is model
    assert "forward" in model.get_base_model().__dict__ and "forward" not in model.__dict__
    assert_same(model)
    adapted = logps(model)
    with model.disable_adapter():
        base = logps(model)
        torch.testing.assert_close(base, definition(model, batch())[0], rtol=1e-5, atol=2e-5)
    assert (adapted - base).abs().max() > 0.01
    unpatch_model(model)
    assert "forward" not in model.get_base_model().__dict__


@pytest.mark.parametrize("case", ["all", "head", "head, bias of B", "DoRA on the head", "tokens of the head"])
def test_merged(case):
    name, options = CASES[case]
    model = wrapped(patch_model(build(name)), lora(**options))
    expected, base_weight = logps(model), model.get_base_model().get_output_embeddings()
    if case != "tokens of the head":
        base_weight = getattr(base_weight, "base_layer", base_weight).weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(logps(model), expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(logps(model), definition(model, batch())[0], rtol=1e-5, atol=2e-5)
    with model.disable_adapter():  # unmerges, as PEFT's own forward does
        torch.testing.assert_close(logps(model), definition(model, batch())[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logps(model), definition(model, batch())[0], rtol=1e-5, atol=2e-5)


def test_merged_and_disabled_unmerges_as_peft_does():
    model = wrapped(build(), lora(**ON_HEAD))
    patch_model(model)
    expected = model.get_base_model().get_output_embeddings().base_layer.weight.clone()
    model.merge_adapter()
    with model.disable_adapter():
        model(**batch(), fastdpo=True)
        torch.testing.assert_close(model.get_base_model().get_output_embeddings().base_layer.weight, expected)


def test_lora_on_the_head_stays_two_factors():
    model = wrapped(build("phi (bias)"), lora(**ON_HEAD))
    patch_model(model, backward="exact")
    head = model.get_base_model().get_output_embeddings()
    hidden = torch.zeros(2, 32)
    found, weight, bias, (a, b, scale) = applied_head(head, hidden)
    assert found is hidden and weight is head.base_layer.weight and bias is head.base_layer.bias
    assert a is head.lora_A["default"].weight and b is head.lora_B["default"].weight and scale == 2.0


@pytest.mark.parametrize("ranks", [(4, 4), (4, 20)])
def test_several_active_adapters_on_the_head(ranks):
    model = wrapped(build(), lora(r=ranks[0], **ON_HEAD))
    patch_model(model, backward="exact")
    model.add_adapter("other", lora(r=ranks[1], lora_alpha=3, **ON_HEAD))
    randomise(model)
    one = logps(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same(model)
    assert (logps(model) - one).abs().max() > 0.01


def test_a_reference_adapter():
    """DPO with two adapters on one base: "default" is trained, "ref" scores, and neither changes the other."""
    model = wrapped(build(), lora(**ON_HEAD))
    patch_model(model, backward="exact")
    model.add_adapter("ref", lora(**EVERYWHERE))
    randomise(model)
    seen = {}
    for name in ("default", "ref"):
        model.set_adapter(name)
        assert_same(model)
        seen[name] = logps(model)
    with model.disable_adapter():
        seen["base"] = logps(model)
        torch.testing.assert_close(seen["base"], definition(model, batch())[0], rtol=1e-5, atol=2e-5)
    model.set_adapter("default")
    assert torch.equal(logps(model), seen["default"])
    for one, other in [("default", "ref"), ("ref", "base"), ("default", "base")]:
        assert (seen[one] - seen[other]).abs().max() > 0.01
    grads = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    assert grads and all(".default." in name for name in grads)


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("adapters", [1, 2])
def test_lora_on_the_head_with_dropout(rank, adapters):
    """A sees dropout(hidden), the head hidden. One seed draws the same masks on both ways."""
    model = wrapped(build("phi (bias)"), lora(r=rank, lora_dropout=0.4, target_modules=["lm_head"]))
    if adapters == 2:
        model.add_adapter("other", lora(lora_dropout=0.2, target_modules=["lm_head"]))
        randomise(model).base_model.set_adapter(["default", "other"])
    patch_model(model, backward="exact")
    inputs = batch()
    head = model.get_base_model().get_output_embeddings()
    head.train()  # the only dropout that is active
    torch.manual_seed(5)
    expected, _ = definition(model, inputs)
    expected_grads = gradients(model, expected.sum())
    masks = []
    for dropout in head.lora_dropout.values():
        dropout.register_forward_hook(lambda _, args, out: masks.append(out.shape))
    torch.manual_seed(5)
    found = model(**inputs, fastdpo=True).logps
    assert masks[:adapters] == [(3, 9, 32)] * adapters
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    grads = gradients(model, found.sum())
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)
    head.eval()
    assert (logps(model) - expected).abs().max() > 0.01


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("order", ["patch first", "wrap first"])
def test_prompt_learning(kind, order):
    """Virtual tokens that PEFT puts before the inputs are ignored labels: [B, virtual + T - 1]; a prefix has none."""
    model, config = build(), PROMPTS[kind]()
    if order == "patch first":
        model = get_peft_model(patch_model(model, backward="exact"), config)
    else:
        model = patch_model(get_peft_model(model, config), backward="exact")
    model.eval()
    inputs = batch()
    virtual = 0 if kind == "prefix tuning" else 4
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, virtual:]
    targets = inputs["labels"][:, 1:]
    expected = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = expected.masked_fill(targets == -100, 0.0)
    expected_grads = gradients(model, expected.sum())
    found = model(**inputs, fastdpo=True).logps
    assert found.shape == (3, virtual + 8)
    assert not found[:, :virtual].any()
    torch.testing.assert_close(found[:, virtual:], expected, rtol=1e-5, atol=2e-5)
    grads = gradients(model, found.sum())
    assert grads and grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-4, atol=1e-4)


class Int8Linear(torch.nn.Module):
    """Holds its weight as bitsandbytes' Linear8bitLt and Linear4bit do, in integers."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight * self.scale, self.bias)


class PackedLinear(Int8Linear):
    """Holds it under another name, as GPTQ's and AWQ's linears do."""

    def __init__(self, linear):
        super().__init__(linear)
        self.qweight = self.weight
        del self.weight

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.qweight * self.scale, self.bias)


class Float8Linear(Int8Linear):
    def __init__(self, linear):
        super().__init__(linear)
        self.scale = torch.tensor(1.0)
        self.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight.float(), self.bias)


@pytest.mark.parametrize(
    ("quantised", "match"),
    [
        (Int8Linear, "Int8Linear.*int8.*quantised"),
        (PackedLinear, "PackedLinear.*no weight"),
        (Float8Linear, "Float8Linear.*float8_e4m3fn.*quantised"),
    ],
)
def test_quantised_heads_are_refused(quantised, match):
    model = build()
    model.lm_head = quantised(model.lm_head)
    with pytest.raises(NotImplementedError, match=match):
        patch_model(model)
    assert "forward" not in model.__dict__
    assert model(**batch()).logits.shape == (3, 9, V)


def test_a_quantised_tensor_subclass_is_refused():
    """torchao's weights say they are bf16."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = build()
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"Linear.*TwoTensor.*quantised"):
        patch_model(model)


def refused(match, model):
    with pytest.raises(NotImplementedError, match=match):
        model(**batch(), fastdpo=True)
    assert model(**batch()).logits.shape == (3, 9, V)


@pytest.mark.parametrize(
    ("match", "config"),
    [
        ("loha", lambda: peft.LoHaConfig(r=2, target_modules=["lm_head"])),
        ("ia3", lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
    ],
)
def test_other_adapters_on_the_head_are_refused(match, config):
    model = wrapped(build(), config())
    with pytest.raises(NotImplementedError, match=match):
        patch_model(model)
    assert "forward" not in model.get_base_model().__dict__
    refused(match, wrapped(patch_model(build()), config()))


INSIDE = {
    "base": (ON_HEAD, lambda head: head.base_layer),
    "A": (ON_HEAD, lambda head: head.lora_A["default"]),
    "B": (ON_HEAD, lambda head: head.lora_B["default"]),
    "saved": (SAVED_HEAD, lambda head: head.modules_to_save["default"]),
}


@pytest.mark.parametrize("where", INSIDE)
def test_hooks_and_forwards_inside_of_the_head_are_refused(where):
    """Their modules are not run: what they would do is not done."""
    options, inside = INSIDE[where]

    def forward_hook(module):
        return module.register_forward_hook(lambda _, args, out: 2 * out)

    def pre_hook(module):
        return module.register_forward_pre_hook(lambda _, args: (2 * args[0],))

    def backward_hook(module):
        return module.register_full_backward_hook(lambda _, given, out: given)

    for hook in (forward_hook, pre_hook, backward_hook):
        model = wrapped(patch_model(build()), lora(**options))
        handle = hook(inside(model.get_base_model().lm_head))
        refused("hook.*lambda", model)
        handle.remove()
        assert_close_to_definition(model)

    model = wrapped(patch_model(build(), backward="exact"), lora(**options))
    module = inside(model.get_base_model().lm_head)
    kind = type(module)
    module.__class__ = type("Doubling", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    refused("Doubling.*forward of its own", model)
    module.__class__ = kind
    nn.utils.parametrizations.weight_norm(module)
    assert_same(model)


def test_a_subclass_of_an_adapter_and_another_dropout():
    model = wrapped(patch_model(build(), backward="exact"), lora(lora_dropout=0.5, **ON_HEAD))
    head = model.get_base_model().lm_head

    class Halving(nn.Module):
        def forward(self, hidden):
            return hidden / 2

    head.lora_dropout["default"] = Halving()
    assert_same(model)
    kind = type(head)
    head.__class__ = type("Doubling", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    refused("Doubling.*forward of its own", model)


def test_an_adapter_that_comes_and_goes():
    """Added after patching, switched, merged and unloaded."""
    model = patch_model(build(), backward="exact")
    before = logps(model)
    adapted = wrapped(model, lora(**EVERYWHERE))
    assert_same(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(logps(merged), logps(adapted), rtol=1e-4, atol=2e-4)
    assert_same(merged.requires_grad_(True))
    plain = adapted.unload()
    assert plain is model and torch.equal(logps(plain), before)
    assert_same(plain.requires_grad_(True))


def test_dora_with_dropout_or_company_is_refused():
    model = wrapped(patch_model(build()), lora(use_dora=True, lora_dropout=0.5, **ON_HEAD))
    assert_close_to_definition(model)
    model.train()
    refused("DoraLinearVariant", model)
    model = wrapped(patch_model(build()), lora(use_dora=True, **ON_HEAD))
    model.add_adapter("other", lora(**ON_HEAD))
    model.base_model.set_adapter(["default", "other"])
    refused("DoraLinearVariant", model)


def assert_close_to_definition(model):
    torch.testing.assert_close(logps(model), definition(model, batch())[0], rtol=1e-5, atol=2e-5)


def test_several_adapters_in_one_batch_are_refused_on_the_head_only():
    model = wrapped(patch_model(build()), lora(**ON_HEAD))
    names = {"adapter_names": ["default", "__base__", "default"]}
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(**batch(), fastdpo=True, **names)
    inside = wrapped(patch_model(build()), lora())
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        found = inside(**inputs, labels=labels, fastdpo=True, **names).logps
        logits = inside(**inputs, **names).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found, picked.masked_fill(labels[:, 1:] == -100, 0.0), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("options", [EVERYWHERE, ON_HEAD, SAVED_HEAD], ids=["all", "head", "saved head"])
def test_bf16_base_with_fp32_adapters(options):
    model = wrapped(patch_model(build().bfloat16(), backward="exact"), lora(**options))
    found = model(**batch(), fastdpo=True).logps
    expected, _ = definition(model, batch())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.15)
    grads = gradients(model, found.sum())
    assert any("lora_B" in name and grad.abs().max() > 0 for name, grad in grads.items())


@pytest.mark.parametrize("kind", ["plain", "head"])
def test_an_older_peft(kind, monkeypatch):
    """Without the wrappers that came later; and one that is not there, while a part of it is."""
    import sys

    from peft.tuners.lora import Linear

    model = build("llama") if kind == "plain" else wrapped(build("llama"), lora(**ON_HEAD))
    for name in ("TrainableTokensWrapper", "AuxiliaryTrainingWrapper"):
        monkeypatch.delattr(sys.modules["peft.utils.other"], name)
    monkeypatch.delitem(sys.modules, "peft.tuners.trainable_tokens")
    assert_same(patch_model(model, backward="exact"))
    if kind == "head":
        layer = model.get_output_embeddings()
        assert isinstance(layer, Linear)
        monkeypatch.delattr(layer, "lora_variant")
        with pytest.raises(NotImplementedError, match=r"before 0\.16"):
            applied_head(layer, torch.zeros(1, 32))
    else:
        monkeypatch.setitem(sys.modules, "peft", None)
        assert_same(model)
