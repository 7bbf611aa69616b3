"""A few small causal language models, a batch for them, and their log-probs by definition."""

from __future__ import annotations

import torch
import transformers

from fastdpo.head import LogitTransform

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
    "llama": ("LlamaConfig", SHAPE, LogitTransform()),
    "llama tied": ("LlamaConfig", SHAPE | {"tie_word_embeddings": True}, LogitTransform()),
    "gemma2 (softcap)": (
        "Gemma2Config",
        SHAPE | {"final_logit_softcapping": 30.0},
        LogitTransform(softcap=30.0),
    ),
    "granite (divides)": ("GraniteConfig", SHAPE | {"logits_scaling": 8.0}, LogitTransform(0.125)),
    "hyperclovax (multiplies)": ("HyperCLOVAXConfig", SHAPE | {"logits_scaling": 4.0}, LogitTransform(4.0)),
    "cohere (scale, tied)": ("CohereConfig", SHAPE | {"logit_scale": 0.0625}, LogitTransform(0.0625)),
    "gpt2 (tied)": ("GPT2Config", GPT2_SHAPE, LogitTransform()),
    "phi (bias)": ("PhiConfig", SHAPE, LogitTransform()),
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
