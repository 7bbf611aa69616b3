"""Sizes of a head from a config.json of any layout."""

from __future__ import annotations

import json

import pytest

from fastdpo.commands.local_config import head_sizes


def written(tmp_path, config) -> str:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    "config, vocab, hidden, dtype, tied",
    [
        ({"vocab_size": 128256, "hidden_size": 4096, "torch_dtype": "bfloat16", "tie_word_embeddings": False},
         128256, 4096, "bfloat16", False),
        ({"vocab_size": 50257, "n_embd": 768}, 50257, 768, None, None),  # GPT-2
        ({"vocab_size": 50368, "d_model": 2048, "dtype": "float16"}, 50368, 2048, "float16", None),  # MPT
        ({"vocab_size": 50272, "hidden_size": 1024, "word_embed_proj_dim": 512}, 50272, 512, None, None),  # OPT
        ({"padded_vocab_size": 65024, "hidden_size": 4096}, 65024, 4096, None, None),  # ChatGLM
        ({"text_config": {"vocab_size": 262208, "hidden_size": 2560, "dtype": "torch.bfloat16"}, "hidden_size": 7,
          "vision_config": {"hidden_size": 1152}, "tie_word_embeddings": True}, 262208, 2560, "bfloat16", True),
        ({"llm_config": {"vocab_size": 92553, "hidden_size": 2048}, "torch_dtype": "bfloat16"},
         92553, 2048, "bfloat16", None),  # InternVL
        ({"thinker_config": {"text_config": {"vocab_size": 152064, "hidden_size": 3584}}}, 152064, 3584, None, None),
        ({"vocab_size": 32000, "text_config": {"hidden_size": 5120}}, 32000, 5120, None, None),
    ],
)  # fmt: skip
def test_layouts(tmp_path, config, vocab, hidden, dtype, tied):
    found = head_sizes(written(tmp_path, config))
    assert (found.vocab, found.hidden, found.dtype, found.tied) == (vocab, hidden, dtype, tied)
    assert head_sizes(tmp_path / "config.json") == found


def test_what_is_said_of_odd_ones(tmp_path):
    found = head_sizes(written(tmp_path, {
        "vocab_size": 32, "hidden_size": 8, "torch_dtype": "float8_e4m3fn", "is_encoder_decoder": True,
        "quantization_config": {"bits": 4}, "architectures": ["T5ForConditionalGeneration"],
    }))  # fmt: skip
    assert found.dtype is None and found.family == "T5ForConditionalGeneration"
    notes = " ".join(found.notes)
    assert "float8_e4m3fn" in notes and "quantised" in notes and "encoder" in notes


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_size": 8}, r"config.json has no vocab_size \(vocab_size, padded_vocab_size"),
        ({"vocab_size": 8}, r"config.json has no hidden_size \(word_embed_proj_dim, hidden_size"),
        ({"vocab_size": 8, "text_config": {}}, "it or its text_config"),
        ({"vocab_size": "8k", "hidden_size": 8}, "vocab_size is '8k', no size"),
        ({"vocab_size": 8, "n_embd": 0}, "n_embd is 0, no size"),
        ("{", "is no JSON"),
        ("[]", "must hold one JSON object; it holds a list"),
    ],
)
def test_what_is_missing_is_named(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        head_sizes(written(tmp_path, config))


def test_no_file_and_no_hub(tmp_path):
    with pytest.raises(ValueError, match=r"--model .*: there is no .*config.json$"):
        head_sizes(tmp_path)
    with pytest.raises(ValueError, match="only local files are read, no hub"):
        head_sizes("meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "GPT2Config", "OPTConfig", "Gemma3Config", "FalconConfig", "BloomConfig"]
)
def test_what_transformers_writes(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name)()
    config.save_pretrained(tmp_path)
    text, found = config.get_text_config(), head_sizes(tmp_path)
    hidden = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    assert (found.vocab, found.hidden) == (text.vocab_size, hidden)
