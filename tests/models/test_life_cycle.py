"""What a patched model goes through in a training run: wrapping, compiling, checkpoints, evaluation, resuming."""

import copy
import inspect
import pickle
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from causal_models import assert_same, batch, build, definition, gradients
from peft import LoraConfig, PeftModel, get_peft_model

from fastdpo.integrations import patch_model, unpatch_model
from fastdpo.models.huggingface import _PatchedForward


def everything(model) -> dict:
    """The identity of every module, parameter, hook and instance attribute."""
    found = {}
    for name, module in model.named_modules():
        found[name] = id(module)
        for key, value in vars(module).items():
            contents = tuple(value.values()) if isinstance(value, dict) else value
            found[name, key] = [id(x) for x in contents] if isinstance(contents, tuple) else contents
    return found


def test_unpatching_restores_every_object():
    model = build("gemma2 (softcap)")
    before, function = everything(model), model.forward.__func__
    patch_model(model)
    model(**batch(), fastdpo=True).logps.sum().backward()
    with pytest.raises(ValueError, match="labels"):
        model(**batch() | {"labels": None}, fastdpo=True)
    assert unpatch_model(model) is model
    after = everything(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] is value or after[key] == value, key
    assert model.forward.__func__ is function


def test_patching_twice_is_patching_once():
    model = build()
    patch_model(model, temperature=2.0)
    first = model.forward
    patch_model(model, backward="exact")
    assert model.forward is first and first.settings.options.temperature == 1.0
    assert_same(model)
    unpatch_model(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_adapted_model(through):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(patch_model(build(), backward="exact"), config).eval()
    expected = model(**batch(), fastdpo=True).logps
    twin = through(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**batch(), fastdpo=True).logps, expected)
    assert_same(twin)


def test_save_and_load(tmp_path):
    model, plain = build(), build()
    patch_model(model, backward="exact")
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert "forward" not in loaded.__dict__
    expected = model(**batch(), fastdpo=True).logps
    assert torch.equal(patch_model(loaded)(**batch(), fastdpo=True).logps, expected)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(**batch(), fastdpo=True).logps, expected)


def test_save_and_load_an_adapter(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(patch_model(build()), config).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(patch_model(build()), tmp_path).eval()
    found = loaded(**batch(), fastdpo=True).logps
    torch.testing.assert_close(found, model(**batch(), fastdpo=True).logps)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch(), fastdpo=True).logps, found, rtol=1e-4, atol=1e-4)


def test_evaluation_and_generation():
    model, plain = patch_model(build()), build()
    with torch.no_grad():
        found = model(**batch(), fastdpo=True).logps
    assert not found.requires_grad
    torch.testing.assert_close(found, definition(model, batch())[0], rtol=1e-5, atol=2e-5)
    with torch.inference_mode():
        assert torch.equal(model(**batch(), fastdpo=True).logps, found)
    arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    prompt = batch()["input_ids"][:1, :5]
    assert torch.equal(model.generate(prompt, **arguments), plain.generate(prompt, **arguments))
    assert torch.equal(model(**batch(), fastdpo=True).logps, found)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing(use_reentrant, adapted):
    model = patch_model(build(), backward="exact")
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
        model.enable_input_require_grads()
    model.train()
    expected = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    recomputed = []
    layer = model.get_base_model().model.layers[0] if adapted else model.model.layers[0]
    layer.self_attn.register_forward_pre_hook(lambda *_: recomputed.append(True))
    grads = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    assert len(recomputed) == 2 and grads.keys() == expected.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], msg=name)


def test_gradient_accumulation():
    model = patch_model(build(), backward="exact")
    whole = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    model.zero_grad()
    for row in range(3):
        part = {name: x[row : row + 1] for name, x in batch().items()}
        model(**part, fastdpo=True).logps.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5, msg=name)


def test_autocast():
    model = patch_model(build(), backward="exact")
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch(), fastdpo=True).logps
    assert found.dtype == torch.float32
    grads = gradients(model, found.sum())
    expected, _ = definition(model, batch())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.3)
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("how", ["patch, compile", "compile, patch", "in place, patch"])
def test_compiled(how):
    torch._dynamo.reset()
    model = build()
    if how == "patch, compile":
        compiled = torch.compile(patch_model(model, backward="exact"), backend="eager", fullgraph=True)
    elif how == "compile, patch":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(**batch())
        assert patch_model(compiled, backward="exact") is compiled
    else:
        model.compile(backend="eager", fullgraph=True)
        model(**batch())
        compiled = patch_model(model, backward="exact")
    assert isinstance(vars(model)["forward"], _PatchedForward)
    expected, _ = definition(build(), batch())
    expected_grads = gradients(reference := build(), definition(reference, batch())[0].sum())
    found = compiled(**batch(), fastdpo=True).logps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    grads = gradients(model, found.sum())
    for name in expected_grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(compiled(**batch()).logits, build()(**batch()).logits)
    unpatch_model(compiled)
    assert "forward" not in model.__dict__


# accelerate: `prepare` puts autocast into the model's forward, `unwrap_model` looks for what was there before


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a trainer of another test made one
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def assert_behaves_like(model, other, atol=2e-5):
    """Plain calls and generation, exactly; log-probs as those of the other's logits."""
    prompt, arguments = batch()["input_ids"][:1, :4], {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, other(**batch()).logits)
        assert torch.equal(model.generate(prompt, **arguments), other.generate(prompt, **arguments))
        found, expected = model(**batch(), fastdpo=True).logps, definition(other, batch())[0]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)
    assert inspect.signature(model.forward) == inspect.signature(build().forward)


@pytest.mark.parametrize("order", ["patch first", "prepare first"])
@pytest.mark.parametrize("copied", [False, True])
def test_prepared_by_accelerate(order, copied, accelerator):
    plain, prepared = build(), accelerator.prepare(build())
    if order == "patch first":
        model = accelerator.prepare(patch_model(build(), backward="exact"))
    else:
        model = patch_model(accelerator.prepare(build()), backward="exact")
    original, others = model, (plain, prepared)
    if copied:  # the copy is a model of its own
        model = copy.deepcopy(model)
        with torch.no_grad():
            for other in (model, *others):
                other.lm_head.weight.mul_(0.5)
        assert model(**batch()).logits.ne(original(**batch()).logits).any()
    assert_behaves_like(model, prepared, atol=0.1)  # logits in bf16
    grads = gradients(model, model(**batch(), fastdpo=True).logps.sum())
    assert grads and all(grad.isfinite().all() for grad in grads.values())

    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_behaves_like(model, plain)
    assert_same(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_behaves_like(twin, plain)
    assert_behaves_like(pickle.loads(pickle.dumps(twin)), plain)
    unpatch_model(twin)
    assert torch.equal(twin(**batch()).logits, plain(**batch()).logits)
    assert twin.forward.__func__ is type(twin).forward and "_fastdpo" not in vars(twin)


def test_an_unwrapped_model_is_not_saved_so_that_it_cannot_be_loaded(accelerator):
    model = accelerator.unwrap_model(accelerator.prepare(patch_model(build())), keep_fp32_wrapper=False)
    with pytest.raises(AttributeError, match="after a call, or unpatched"):
        pickle.dumps(model)
    model(**batch())
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("order", ["patch first", "prepare first"])
def test_unpatching_a_prepared_model(order, accelerator):
    plain, prepared = build(), accelerator.prepare(build())
    if order == "patch first":
        model = unpatch_model(accelerator.prepare(patch_model(build())))
        with pytest.raises(TypeError, match="unpatch_model"):
            model(**batch(), fastdpo=True)
    else:
        model = unpatch_model(patch_model(accelerator.prepare(build())))
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks
    assert torch.equal(model(**batch()).logits, prepared(**batch()).logits)
    patch_model(model, backward="exact")
    assert_behaves_like(model, prepared, atol=0.1)
    model = accelerator.unwrap_model(unpatch_model(model), keep_fp32_wrapper=False)
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    unpatch_model(model)
    assert "_fastdpo" not in vars(model) and not isinstance(model.forward, _PatchedForward)


@pytest.mark.parametrize("order", ["patch first", "devices first"])
def test_the_hooks_of_a_device_map(order):
    """They stand in the place of every module's forward."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = build(), build()
    if order == "patch first":
        patch_model(model, backward="exact")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert patch_model(model, backward="exact") is model
    assert_behaves_like(model, plain)
    assert_same(model)
    unpatch_model(model)
    hooks.remove_hook_from_module(model, recurse=True)
    unpatch_model(model)
    assert model.forward.__func__ is type(model).forward and "_fastdpo" not in vars(model)


def test_a_forward_that_is_replaced_and_patched_again():
    """As Liger's does; nothing is left of the first patch."""
    model = patch_model(build(), temperature=2.0)
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(self, *args, **kwargs), model)
    assert model.forward(**batch()).logits.shape == (3, 9, 300)
    patch_model(model, backward="exact")
    assert_same(model)
    unpatch_model(model)
    assert "_fastdpo" not in vars(model) and not model.lm_head._forward_hooks


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        ids = torch.randint(3, 300, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.clone()}


class LogpTrainer(transformers.Trainer):
    """A loss over token log-probs, as a user would write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = -model(**inputs, fastdpo=True).logps.mean()
        return (loss, {"loss": loss}) if return_outputs else loss


@pytest.mark.parametrize("adapted", [False, True])
def test_a_trainer_resumes_from_its_checkpoint(adapted, tmp_path):
    """Six steps in one run, and three, a checkpoint and three more, end in the same weights."""

    def trainer(folder):
        model = build()
        if adapted:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
        args = transformers.TrainingArguments(
            str(tmp_path / folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=3,
            prediction_loss_only=True,
            seed=3,
        )
        model = patch_model(model, backward="exact")
        return LogpTrainer(model, args, train_dataset=Pairs(), eval_dataset=Pairs())

    whole = trainer("whole")
    whole.train()
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    start = dict(trainer("start").model.named_parameters())
    moved = False
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters()):
        torch.testing.assert_close(one, other, msg=name)
        moved |= not torch.equal(one, start[name])
    assert moved
