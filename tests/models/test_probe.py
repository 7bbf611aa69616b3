"""Which scale and softcap a model applies: found by its own logits, whatever its configuration says."""

import pytest
import torch

pytest.importorskip("transformers")
import tiny_models
import transformers
from causal_models import MODELS, SHAPE, V, assert_same, batch, build, definition

from fastdpo.head import LogitTransform
from fastdpo.integrations import patch_model


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
    assert model.forward.transform == LogitTransform()
    assert_same(model)


def test_a_model_that_needs_more_than_tokens_is_refused():
    model = build()

    def needs_pixels(input_ids=None, *, pixel_values, **kwargs):
        return type(model).forward(model, input_ids, **kwargs)

    model.forward = needs_pixels
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*pixel_values"):
        patch_model(model)
    assert model.forward is needs_pixels


def test_the_probe_draws_no_placeholder():
    """Every id but nine names an image: a model that counts placeholders is still probed."""
    model = build()
    model.config.image_token_ids = list(range(9, V))
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    patch_model(model)
    assert seen and all(ids.max() < 9 for ids in seen)


def test_the_probe_takes_a_length_the_model_takes():
    config = tiny_models.tiny_config(transformers.xLSTMConfig, {"mode": "train", "chunk_size": 64})
    model = patch_model(transformers.xLSTMForCausalLM(config), backward="exact")
    ids = torch.randint(3, V, (2, 64), generator=torch.Generator().manual_seed(0))
    found = model(ids, labels=ids, fastdpo=True).logps
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
