"""Tiny models of transformers' classes, built from nothing but their configuration class.

Every field that is a size is made small, in the configuration and in those inside it; the factors and caps of
the logits get values that show; ids of special tokens move to the end of the vocabulary. What a class needs
besides stands in OVERRIDES.
"""

from __future__ import annotations

import dataclasses
import re

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V = 300  # not a multiple of 128: the last block of the vocabulary is not full

# The first pattern that matches a field's whole name gives its value; a default that is no number is left alone
SIZES = [
    (r"(vocab_size|unpadded_vocab_size|original_vocab_size)", V),
    (r"vocab_size_per_layer_input", V),
    (r"(hidden_size|d_model|n_embd|dim_model|emb_dim|dim|embed_dim|embedding_size|backbone_hidden_size)", 64),
    (r"(input|output)_embedding_size|hidden_dim|out_hidden_size|word_embed_proj_dim|text_hidden_size|n_hidden", 64),
    (r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(decoder_|encoder_)layers|depth)", 2),
    (r"((linear_)?num_(attention_|decoder_attention_|encoder_attention_)?heads|n_heads?|attention_heads)", 4),
    (r"(decoder|encoder)_attention_heads|swa_num_attention_heads", 4),
    (r"(swa_)?num_key_value_heads|num_global_key_value_heads|n_head_kv|num_kv_heads", 2),
    (r"((swa_|global_)?head_dim|attention_head_size|v_head_dim|qk_nope_head_dim|dim_head|kv_channels)", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"((kv|q|o)_lora_rank|.*_intermediate_size|intermediate_size.*|.*_ffn_dim|ffn_dim|d_ff|dim_ff|dff|n_inner)", 64),
    (r"ffn_hidden_size|expert_ffn_hidden_size|feed_forward_size|d_inner|ffn_size", 64),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k|num_experts_per_token|moe_top_k|n_shared_experts)", 2),
    (r"n_group|topk_group|num_nextn_predict_layers|first_k_dense_replace|num_dense_layers", 1),
    (r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(source|target)_positions|context_length)", 64),
    (r"(mamba_|ssm_)?(d_state|state_size)|chunk_size|mamba_chunk_size", 16),
    (r"(mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads|n_mamba_heads)", 4),
    (r"(mamba_(d_head|head_dim|headdim)|linear_(key|value)_head_dim)", 32),
    (r"(mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"image_size|crop_size", 8),
    (r"(temporal_)?patch_size", 2),
]
LOGITS = [
    (r"logits_scaling|logits_mup_width_multiplier", 4.0),
    (r"logit_scale|output_multiplier|lm_head_multiplier", 0.25),
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 15.0),
    (r"(.*_)?dropout(_rate)?|.*_pdrop|dropout_.*|layerdrop|.*_dropout_prob", 0.0),
]
# By model type, also of inner configurations
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": V - 1}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": V - 1}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}
for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"):
    OVERRIDES[name] = {"rope_parameters": ROPE, "head_dim": 16}
MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text")
for name in (*MROPE, "glm4v_text", "glm46v_text", "glm_ocr_text"):
    OVERRIDES[name] = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
# Tried in turn until the class can be built and run: depths that reach every kind of layer, and attention
# without grouped heads
VARIANTS = [{}, {"num_key_value_heads": 4}]
VARIANTS += [{"num_hidden_layers": n} | v for n in (4, 8) for v in VARIANTS]


def mappings() -> dict[str, str]:
    """{class name: model type} of transformers' causal and image-text-to-text language models."""
    named: dict[str, str] = {}
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for model_type, classes in names.items():
            for name in [classes] if isinstance(classes, str) else classes:
                named.setdefault(name, model_type)
    return named


def tiny_config(cls: type, variant: dict):
    """An instance of the configuration class, and of those inside it, with small sizes."""
    fields = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    ids = iter(range(V - 1, 0, -1))
    values = {}
    for name, default in fields.items():
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        size = next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)
        shown = next((value for pattern, value in LOGITS if re.fullmatch(pattern, name)), None)
        if number and size is not None:
            values[name] = size if "vocab" in name else min(size, default)
        elif (number or default is None) and shown is not None:
            values[name] = type(default)(shown) if isinstance(default, int) else shown
        elif number and re.fullmatch(r".*_(token_id|token_index|id)", name) and default >= V - 40:
            values[name] = next(ids)
    default = _default(cls)
    for name in getattr(cls, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            values[name] = tiny_config(type(inner), variant)
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
    values.update((name, value) for name, value in variant.items() if name in fields)
    return cls(**(values | OVERRIDES.get(cls.model_type, {})))


def _default(cls: type):
    try:
        return cls()
    except Exception:  # needs arguments
        return None


def build(class_name: str, model_type: str):
    """The class in fp32 and evaluation mode, with random weights and logits of a trained model's size.

    Raises what the first of VARIANTS raised.
    """
    cls = getattr(transformers, class_name)
    config_class = cls.config_class or CONFIG_MAPPING[model_type]
    failure = None
    for variant in VARIANTS:
        torch.manual_seed(0)
        try:
            model = cls(tiny_config(config_class, variant)).eval()
            if model.config.is_encoder_decoder:
                failure = TypeError("an encoder-decoder")
                break
            with torch.no_grad():
                logits = model(**inputs(model)).logits
        except Exception as error:
            failure = failure or error
            continue
        _enlarge(model, logits)
        return model
    raise failure


def inputs(model) -> dict:
    """Two rows of nine ordinary tokens."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, V - 50, (2, 9), generator=generator)}


@torch.no_grad()
def _enlarge(model, logits) -> None:
    """New weights give logits near 0, which show no scale and no cap: raise them to 10, and give biases values."""
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        return
    head.weight.mul_(min(10.0 / max(float(logits.abs().max()), 1e-3), 25.0))
    if getattr(head, "bias", None) is not None:
        head.bias.normal_()
