"""patch_model: the model's own log-probs and gradients without its logits, and nothing else changed."""

import copy
import inspect
import io
import pickle
import tempfile

import pytest
import torch

pytest.importorskip("transformers")

import model_matrix
import tiny_models
import transformers
from causal_models import MODELS, V, assert_same, batch, build, definition, gradients

import fastdpo
from fastdpo.integrations import patch_model, unpatch_model
from fastdpo.models import head_call, probe
from fastdpo.models.huggingface import _PatchedForward


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
    patch_model(model, temperature=0.7, stats=("entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "lse"))
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
    for name in fastdpo.TokenStats._fields:
        assert getattr(stats, name).shape == (3, 8)

    patch_model(model, seed=7, tau=0.01)  # again: the options are new, the model is patched once
    settings = model.forward.settings
    assert settings.options.seed == 7 and settings.options.temperature == 1.0 and settings.stats == ()
    assert model.forward.previous is None
    assert model(**inputs, fastdpo=True).entropy is None


def test_several_labels_of_a_position():
    model = build("gemma2 (softcap)")
    patch_model(model, stats=("lse", "entropy"))
    inputs = batch()
    labels = torch.randint(0, model.config.vocab_size, (*inputs["labels"].shape, 4))
    labels[..., 1], labels[1] = labels[..., 0], -100
    labels[0, 3, 2] = -100
    rest = {name: x for name, x in inputs.items() if name != "labels"}
    stats = model(**rest, labels=labels, fastdpo=True)
    z = model(**rest).logits[:, :-1].float()
    ids = labels[:, 1:]
    logps = z.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(ids == -100, 0.0)
    lse = z.logsumexp(-1).masked_fill((ids == -100).all(-1), 0.0)
    torch.testing.assert_close(stats.logps, logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(stats.lse, lse, rtol=1e-5, atol=2e-5)
    assert stats.entropy.shape == lse.shape and stats.aux_loss is None
    weight = model.get_output_embeddings().weight
    ours, expected = (
        torch.autograd.grad((x**2).sum() + y.sum(), weight)[0] for x, y in ((stats[0], stats.lse), (logps, lse))
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    as_they_are = model(**rest, shift_labels=labels, fastdpo=True)
    assert as_they_are.logps.shape == labels.shape and as_they_are.lse.shape == labels.shape[:-1]
    for wrong in (labels[:, 1:], labels[..., None]):
        with pytest.raises(ValueError, match="labels must have shape"):
            model(**rest, labels=wrong, fastdpo=True)


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
    assert hooks | {"lm_head": 1} == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
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


def split_by_zero3(head, gathered=True):
    """ZeRO-3's hooks, in short: what test_zero.py tries with DeepSpeed itself, where that is installed."""
    whole, empty = head.weight.data, torch.empty(0)
    head.weight.ds_id, head.weight.data = 0, empty

    def gather(*_):
        head.weight.data = whole if gathered else empty

    def drop(*_):
        head.weight.data = empty

    class GatherBeforeBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach()

        @staticmethod
        def backward(ctx, upstream):
            gather()
            return upstream

    def hang(module, args, output):
        return torch.utils._pytree.tree_map(GatherBeforeBackward.apply, output)

    for hook in (gather, drop, hang):
        hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(drop)
    head.register_forward_hook(hang)


def test_zero3_gathers_for_the_heads_forward_and_before_the_backward():
    model, plain = patch_model(build(), backward="exact", stats=("entropy",)), build()
    head = model.get_output_embeddings()
    split_by_zero3(head)
    for how in (lambda stats: stats.logps, lambda stats: stats.entropy):
        patch_model(plain, backward="exact", stats=("entropy",))
        expected, found = how(plain(**batch(), fastdpo=True)), how(model(**batch(), fastdpo=True))
        assert head.weight.numel() == 0 and torch.equal(found, expected)
        grads, right = gradients(model, found.sum()), gradients(plain, expected.sum())
        assert head.weight.numel() > 0 and grads.keys() == right.keys()
        for name, grad in grads.items():
            assert torch.equal(grad, right[name]), name


def test_a_head_that_zero3_has_not_gathered_is_refused():
    model = patch_model(build())
    split_by_zero3(model.get_output_embeddings(), gathered=False)
    with pytest.raises(NotImplementedError, match="ZeRO-3 has split and not gathered"):
        model(**batch(), fastdpo=True)


def test_another_default_device(monkeypatch):
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    model, inputs = build(), batch()
    with torch.device("meta"):
        patch_model(model, backward="exact")
        found = model(**inputs, fastdpo=True).logps
    torch.testing.assert_close(found, definition(model, inputs)[0], rtol=1e-5, atol=2e-5)


def test_a_padded_vocabulary():
    """Rows beyond the tokens are part of the model's own softmax, and so of this one."""
    model = build()
    model.resize_token_embeddings(V, pad_to_multiple_of=128)
    assert model.lm_head.weight.shape[0] == 384
    patch_model(model, backward="exact")
    assert_same(model)


def test_the_head_itself_computes_one_position():
    """The model's own forward runs, and no logits of more than one token per sequence exist."""
    model = patch_model(build("gemma2 (softcap)"))
    shapes = []
    model.lm_head.register_forward_hook(lambda _, args, out: shapes.append((args[0].shape[1], out.shape[1])))
    model(**batch(), fastdpo=True)
    assert shapes == [(1, 1)]
    assert model.lm_head(torch.randn(2, 5, model.lm_head.in_features)).shape[1] == 5  # outside of such a call, as ever


# One class per way of making logits; all classes: `python tests/model_matrix.py`
CLASSES = [
    "AyaVisionForConditionalGeneration",  # a scale in the configuration of the text that the wrapper does not apply
    "BertLMHeadModel",  # a transform and a norm between backbone and head, and a bias
    "BloomForCausalLM",
    "Cohere2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "ElectraForCausalLM",  # H of the head is not H of the backbone
    "FalconH1ForCausalLM",
    "Gemma3ForConditionalGeneration",  # no softcap, though the model of its text alone has one
    "GPTJForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HyperCLOVAXForCausalLM",
    "LlavaForConditionalGeneration",
    "MambaForCausalLM",
    "MiniCPM3ForCausalLM",  # divides hidden, not logits
    "OPTForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "RecurrentGemmaForCausalLM",  # its softcap has a name of its own
    "xLSTMForCausalLM",
]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_in_fp32_and_bf16(name):
    row = model_matrix.examine(name, tiny_models.mappings()[name])
    assert row["verdict"] == "exact", row
    assert row["float32"]["nats"] < 1e-5 and row["float32"]["gradient"] < 1e-4
    assert row["bfloat16"]["nats"] > 0  # the model's own logits are rounded


def test_the_matrix_tells_wrong_from_refused(monkeypatch):
    name = "HyperCLOVAXForCausalLM"  # multiplies by what others divide by: the first guess is wrong
    for module, table in ((probe, "PROBE_TOLERANCE"), (head_call, "TOLERANCE")):
        monkeypatch.setattr(module, table, {torch.float32: 1e9, torch.bfloat16: 1e9})
    row = model_matrix.examine(name, "hyperclovax")
    assert row["verdict"] == "wrong" and "nats" in row["why"]
    monkeypatch.undo()
    monkeypatch.setattr(probe, "DIVISORS", ())
    row = model_matrix.examine(name, "hyperclovax")
    assert row["verdict"] == "refused" and name in row["why"] and "nats" in row["why"]
    row = model_matrix.examine("T5Gemma2ForConditionalGeneration", "t5gemma2")
    assert row["verdict"] == "not built" and "encoder-decoder" in row["why"]
