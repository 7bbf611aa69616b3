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
    (r"image_size|crop_size", 32),
    (r"patch_size", 16),
]
LOGITS = [
    (r"logits_scaling|logits_mup_width_multiplier", 4.0),
    (r"logit_scale|output_multiplier|lm_head_multiplier", 0.25),
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 15.0),
    (r"(.*_)?dropout(_rate)?|.*_pdrop|dropout_.*|layerdrop|.*_dropout_prob", 0.0),
]
OVERRIDES: dict[str, dict] = {}


def mappings() -> dict[str, str]:
    """{class name: model type} of transformers' causal and image-text-to-text language models."""
    named = {}
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for model_type, classes in names.items():
            for name in [classes] if isinstance(classes, str) else classes:
                named.setdefault(name, model_type)
    return named


def tiny_config(cls: type, given: dict | None = None):
    """An instance of the configuration class with small sizes; `given` wins."""
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    ids = iter(range(V - 1, 0, -1))
    values = {}
    for name, default in fields.items():
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        for pattern, value in SIZES:
            if number and re.fullmatch(pattern, name):
                values[name] = min(value, default) if name != "vocab_size" else value
                break
        for pattern, value in LOGITS:
            if (number or default is None) and re.fullmatch(pattern, name):
                values[name] = value
        if number and re.fullmatch(r".*(_token_id|_token_index|_id)", name) and default >= V - 40:
            values[name] = next(ids)
    for name in getattr(cls, "sub_configs", {}):
        inner = getattr(cls(), name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            own = OVERRIDES.get(inner.model_type, {})
            values[name] = tiny_config(type(inner), own)
    return cls(**(values | (given or {})))


def build(class_name: str, model_type: str):
    """The class with random weights and logits of a trained model's size, in fp32, in evaluation mode."""
    config = tiny_config(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type))
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config).eval()
