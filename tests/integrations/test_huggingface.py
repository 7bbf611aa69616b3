"""patch_model: the model's own log-probs and gradients without its logits, and nothing else changed."""

import copy
import inspect
import io
import pickle
import tempfile

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from peft import LoraConfig, get_peft_model

from fastdpo.integrations import patch_model, unpatch_model
from fastdpo.integrations.huggingface import LogitsTransform, _PatchedForward
from fastdpo.integrations.lm_head import applied_head

V = 300
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SHAPE = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": ("LlamaConfig", SHAPE, LogitsTransform()),
    "llama tied": ("LlamaConfig", SHAPE | {"tie_word_embeddings": True}, LogitsTransform()),
    "gemma2 (softcap)": (
        "Gemma2Config",
        SHAPE | {"final_logit_softcapping": 30.0},
        LogitsTransform(softcap=30.0),
    ),
    "granite (divides)": ("GraniteConfig", SHAPE | {"logits_scaling": 8.0}, LogitsTransform(0.125)),
    "hyperclovax (multiplies)": ("HyperCLOVAXConfig", SHAPE | {"logits_scaling": 4.0}, LogitsTransform(4.0)),
    "cohere (scale, tied)": ("CohereConfig", SHAPE | {"logit_scale": 0.0625}, LogitsTransform(0.0625)),
    "gpt2 (tied)": ("GPT2Config", GPT2_SHAPE, LogitsTransform()),
    "phi (bias)": ("PhiConfig", SHAPE, LogitsTransform()),
}


def build(name: str = "llama", seed: int = 0):
    config, shape, _ = MODELS[name]
    torch.manual_seed(seed)
    shape = shape | {"attention_dropout": 0.0} if "n_embd" not in shape else shape
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**shape))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=0.5)
        if head.bias is not None:
            head.bias.normal_()
    return model.eval()  # no dropout


def batch(seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[1, :2] = labels[2, :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def definition(model, inputs, temperature=1.0):
    """Log-probs from the model's own logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logps = (logits[:, :-1].float() / temperature).log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0.0), logps


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model):
    """Values and every parameter's gradient, against those through the model's own logits."""
    inputs = batch()
    weights = torch.linspace(-1.0, 2.0, 24).view(3, 8)
    expected, _ = definition(model, inputs)
    expected_grads = gradients(model, (expected * weights).sum())
    stats = model(**inputs, fastdpo=True)
    assert stats.logps.shape == (3, 8) and stats.logps.dtype == torch.float32
    torch.testing.assert_close(stats.logps, expected, rtol=1e-5, atol=2e-5)
    grads = gradients(model, (stats.logps * weights).sum())
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)
    return stats


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = build(name)
    assert patch_model(model, backward="exact") is model
    assert model.forward.transform == pytest.approx(MODELS[name][2])
    stats = assert_same(model)
    assert stats.entropy is None and stats.is_top1 is None
    assert not stats.logps[2].any()


def test_statistics_temperature_and_options():
    model = build("gemma2 (softcap)")
    patch_model(model, temperature=0.7, stats=("entropy", "mean_logit", "is_top1", "log_sum_sq_probs"))
    inputs = batch()
    with torch.no_grad():
        stats = model(**inputs, fastdpo=True)
        expected, logps = definition(model, inputs, temperature=0.7)
    ignored = inputs["labels"][:, 1:] == -100
    p = logps.exp()
    torch.testing.assert_close(stats.logps, expected, rtol=1e-5, atol=2e-5)
    entropy = -(p * logps).sum(-1).masked_fill(ignored, 0.0)
    torch.testing.assert_close(stats.entropy, entropy, rtol=1e-5, atol=2e-5)
    sum_sq = (2 * logps).logsumexp(-1).masked_fill(ignored, 0.0)
    torch.testing.assert_close(stats.log_sum_sq_probs, sum_sq, rtol=1e-5, atol=2e-5)
    top1 = (logps.argmax(-1) == inputs["labels"][:, 1:]) & ~ignored
    assert torch.equal(stats.is_top1, top1)
    for name in stats._fields:
        assert getattr(stats, name).shape == (3, 8)

    patch_model(model, seed=7, tau=0.01)  # again: the options are new, the model is patched once
    settings = model.forward.settings
    assert settings.head.seed == 7 and settings.head.temperature == 1.0 and settings.stats == ()
    assert model.forward.previous is None
    assert model(**inputs, fastdpo=True).entropy is None


def test_shifted_labels_and_other_arguments():
    model = build()
    patch_model(model)
    inputs = batch()
    labels = inputs.pop("labels")
    shifted = torch.cat((labels[:, 1:], torch.full((3, 1), -100)), dim=1)
    stats = model(**inputs, labels=labels, fastdpo=True)
    unshifted = model(**inputs, shift_labels=shifted, fastdpo=True)
    assert unshifted.logps.shape == (3, 9)
    assert torch.equal(unshifted.logps[:, :-1], stats.logps)
    positional = model(inputs["input_ids"], inputs["attention_mask"], labels=labels, fastdpo=True)
    assert torch.equal(positional.logps, stats.logps)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    by_embeds = model(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        labels=labels,
        fastdpo=True,
        return_dict=None,
    )
    assert torch.equal(by_embeds.logps, stats.logps)
    with pytest.raises(ValueError, match="neither"):
        model(**inputs, fastdpo=True)
    with pytest.raises(ValueError, match="both"):
        model(**inputs, labels=labels, shift_labels=shifted, fastdpo=True)
    with pytest.raises(ValueError, match=r"\(3, 9\).*\(3, 8\)"):
        model(**inputs, labels=labels[:, 1:], fastdpo=True)
    for name in ("logits_to_keep", "num_items_in_batch"):
        with pytest.raises(TypeError, match=name):
            model(**inputs, labels=labels, fastdpo=True, **{name: 2})


def test_unpatched_behaviour_is_untouched():
    model, plain = build(), build()
    patch_model(model)
    inputs = batch()
    ours, theirs = model(**inputs), plain(**inputs)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    prompt = inputs["input_ids"][:1, :4]
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(prompt, **arguments), plain.generate(prompt, **arguments))


def test_unpatch_restores():
    model = build()
    before = model.forward.__func__
    unpatch_model(model)
    patch_model(model)
    assert isinstance(model.__dict__["forward"], _PatchedForward)
    assert unpatch_model(model) is model
    assert "forward" not in model.__dict__ and model.forward.__func__ is before
    assert not hasattr(model(**batch()), "logps")

    def own(*args, **kwargs):  # another library's, on the instance
        return type(model).forward(model, *args, **kwargs)

    model.forward = own
    patch_model(model)
    assert model(**batch(), fastdpo=True).logps.shape == (3, 8)
    unpatch_model(model)
    assert model.__dict__["forward"] is own


def test_patching_disturbs_nothing():
    model = build("gpt2 (tied)")
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    patch_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert hooks == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]) and torch.equal(parameter.grad, torch.ones_like(parameter))


def test_copies_and_pickles():
    model = build("granite (divides)")
    patch_model(model, backward="exact")
    inputs = batch()
    expected = model(**inputs, fastdpo=True).logps
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    for other in copies:
        assert other.forward.model is other
        assert torch.equal(other(**inputs, fastdpo=True).logps, expected)
    with tempfile.TemporaryDirectory() as folder:
        copies[0].save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "forward" not in loaded.__dict__
    patch_model(loaded)
    torch.testing.assert_close(loaded(**inputs, fastdpo=True).logps, expected)


def lora(**options) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options))


def wrapped(model, config):
    torch.manual_seed(3)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


EVERYWHERE = {"target_modules": "all-linear"}
ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}
SAVED_HEAD = {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    "options", [{}, EVERYWHERE, ON_HEAD, SAVED_HEAD], ids=["attention", "all", "head", "saved head"]
)
@pytest.mark.parametrize("order", ["patch first", "wrap first"])
def test_peft(options, order):
    model = build()
    if order == "patch first":
        patch_model(model, backward="exact")
        model = wrapped(model, lora(**options))
    else:
        model = wrapped(model, lora(**options))
        assert patch_model(model, backward="exact") is model
    assert "forward" in model.get_base_model().__dict__ and "forward" not in model.__dict__
    assert_same(model)
    inputs = batch()
    adapted = model(**inputs, fastdpo=True).logps
    with model.disable_adapter():
        base = model(**inputs, fastdpo=True).logps
        torch.testing.assert_close(base, definition(model, inputs)[0], rtol=1e-5, atol=2e-5)
    assert (adapted - base).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs, fastdpo=True).logps, adapted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    unpatch_model(model)
    assert "forward" not in model.get_base_model().__dict__


def test_lora_on_the_head_stays_two_factors():
    model = wrapped(build("phi (bias)"), lora(**ON_HEAD))
    patch_model(model, backward="exact")
    head = model.get_base_model().get_output_embeddings()
    hidden, weight, bias, (a, b, scale) = applied_head(head, torch.zeros(2, 32))
    assert hidden.shape == (2, 32)
    assert a is head.lora_A["default"].weight and b is head.lora_B["default"].weight and scale == 2.0
    assert weight is head.base_layer.weight and bias is head.base_layer.bias
    assert_same(model)


def test_merged_and_disabled_unmerges_as_peft_does():
    model = wrapped(build(), lora(**ON_HEAD))
    patch_model(model)
    expected = model.get_base_model().get_output_embeddings().base_layer.weight.clone()
    model.merge_adapter()
    with model.disable_adapter():
        model(**batch(), fastdpo=True)
        torch.testing.assert_close(model.get_base_model().get_output_embeddings().base_layer.weight, expected)


def second_adapter(model):
    model.add_adapter("other", lora(**ON_HEAD))
    model.base_model.set_adapter(["default", "other"])


def test_heads_that_are_refused():
    def refused(match, model, prepare=None):
        patch_model(model)
        if prepare:
            prepare(model)
        with pytest.raises(NotImplementedError, match=match):
            model(**batch(), fastdpo=True)
        assert model(**batch()).logits.shape == (3, 9, V)

    refused("default, other", wrapped(build(), lora(**ON_HEAD)), second_adapter)
    refused(r"lora_dropout=0\.5", wrapped(build(), lora(lora_dropout=0.5, **ON_HEAD)), lambda m: m.train())
    for match, config in [
        ("Dora", lora(use_dora=True, **ON_HEAD)),
        ("lora_bias", lora(lora_bias=True, **ON_HEAD)),
        ("loha", peft.LoHaConfig(r=2, target_modules=["lm_head"])),
        ("TrainableTokens", lora(trainable_token_indices={"lm_head": [5, 6]})),
    ]:
        model = wrapped(build("phi (bias)"), config)
        with pytest.raises(NotImplementedError, match=match):
            patch_model(model)
        assert "forward" not in model.get_base_model().__dict__
        late = wrapped(patch_model(build("phi (bias)")), config)
        with pytest.raises(NotImplementedError, match=match):
            late(**batch(), fastdpo=True)


def test_dropout_is_fine_where_it_does_nothing():
    model = wrapped(build(), lora(lora_dropout=0.5, **ON_HEAD))
    patch_model(model, backward="exact")
    assert_same(model)


class Undeclared(transformers.LlamaForCausalLM):
    """Does to its logits what no configuration names."""

    change = staticmethod(lambda logits: logits * 1.02)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.02,
        lambda z: 30 * torch.tanh(z / 30),
        lambda z: z + torch.arange(z.shape[-1]) * 0.01,
        lambda z: z.roll(1, -1),
        lambda z: z * float("nan"),
    ],
)
@pytest.mark.parametrize("std", [0.02, 0.5])  # the logits of a new model, up to 0.5, and of a trained one, 20
def test_the_probe_trusts_no_configuration(change, std, monkeypatch):
    torch.manual_seed(0)
    model = Undeclared(transformers.LlamaConfig(**SHAPE | {"initializer_range": std})).train()
    monkeypatch.setattr(Undeclared, "change", staticmethod(change))
    with pytest.raises(ValueError, match=r"Undeclared.* nats"):
        patch_model(model)
    assert "forward" not in model.__dict__ and model.training
    assert not model.lm_head._forward_pre_hooks
    model(**batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_in_half_precision(dtype, monkeypatch):
    torch.manual_seed(0)
    model = Undeclared(transformers.LlamaConfig(**SHAPE)).to(dtype)
    for change in (lambda z: 30 * torch.tanh(z / 30), lambda z: 1.2 * z, lambda z: -z):
        monkeypatch.setattr(Undeclared, "change", staticmethod(change))
        with pytest.raises(ValueError, match=r"Undeclared.* nats"):
            patch_model(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2 (softcap)", "granite (divides)", "phi (bias)"])
def test_half_precision_is_recognised(name, dtype):
    model = build(name).to(dtype)
    patch_model(model)
    assert model.forward.transform == pytest.approx(MODELS[name][2])
    inputs = batch()
    with torch.no_grad():
        expected, _ = definition(model, inputs)
        torch.testing.assert_close(model(**inputs, fastdpo=True).logps, expected, rtol=0.0, atol=0.3)


def test_a_wrong_declaration_is_overruled():
    """A softcap and a factor that the class does not apply, as some configurations carry."""
    model = build()
    model.config.final_logit_softcapping = 30.0
    model.config.logit_scale = 0.5
    patch_model(model, backward="exact")
    assert model.forward.transform == LogitsTransform()
    assert_same(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": 30.0}, TypeError, "softcap"),
        ({"lora": None}, TypeError, "lora"),
        ({"backward": "fast"}, ValueError, "'fast'"),
        ({"temperature": 0.0}, ValueError, "0.0"),
        ({"stats": ("entropy", "variance")}, ValueError, "variance"),
        ({"stats": "entropy"}, ValueError, "'entropy'"),
    ],
)
def test_bad_options(options, error, message):
    model = build()
    with pytest.raises(error, match=message):
        patch_model(model, **options)
    assert "forward" not in model.__dict__


def test_what_is_no_causal_model():
    t5 = transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    for model, message in [
        (torch.nn.Linear(2, 2), "Linear"),
        (build().model, "LlamaModel"),
        (transformers.T5ForConditionalGeneration(t5), "encoder-decoder"),
        ("llama", "str"),
    ]:
        with pytest.raises(TypeError, match=message):
            patch_model(model)


def test_inside_distributed_data_parallel(tmp_path):
    """The call goes through DDP's forward, so its gradient hooks are armed."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = patch_model(build(), backward="exact")
        expected = gradients(model, model(**batch(), fastdpo=True).logps.sum())
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        reduced = []
        parallel.register_comm_hook(None, lambda _, bucket: reduced.append(bucket.buffer()) or done(bucket))
        grads = gradients(model, parallel(**batch(), fastdpo=True).logps.sum())
        assert reduced and grads.keys() == expected.keys()
        for name in grads:
            assert torch.equal(grads[name], expected[name]), name
    finally:
        torch.distributed.destroy_process_group()


def done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_gradient_checkpointing_and_frozen_head():
    model = build()
    patch_model(model, backward="exact")
    expected = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    model.gradient_checkpointing_enable()
    model.train()
    model.get_output_embeddings().requires_grad_(False)
    grads = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    assert grads.keys() == expected.keys() - {"lm_head.weight"}
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name])


def test_zero3_is_refused():
    model = build()
    patch_model(model)
    head = model.get_output_embeddings().weight
    head.ds_id, head.data = 0, torch.empty(0)
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        model(**batch(), fastdpo=True)
