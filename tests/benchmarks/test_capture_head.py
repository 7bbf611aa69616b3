"""capture_head.py on a tiny model saved to disk, and that what it writes is what the benchmarks read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def model_and_text(tmp_path):
    from fastdpo.demo.setup import build_tokenizer

    text = [f"the {a} {b} the {a}" for a in ("red", "green", "blue") for b in ("house", "tree", "river", "road")]
    tokenizer = build_tokenizer(text, 400)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in text * 4))
    return model, tmp_path


def capture(monkeypatch, folder: Path, *options: str) -> None:
    from benchmarks.models import capture_head

    arguments = ["--model", folder / "model", "--data", folder / "text.jsonl", "--output", folder / "head.safetensors"]
    monkeypatch.setattr(sys, "argv", ["capture_head.py", *map(str, arguments), "--length", "16", *options])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    capture_head.main()


@pytest.mark.parametrize("sample", [False, True])
def test_captures_what_the_head_sees(model_and_text, sample, monkeypatch, capsys):
    model, folder = model_and_text
    capture(monkeypatch, folder, "--tokens", "40", *["--sample"] * sample)
    head = safetensors.load_file(folder / "head.safetensors")
    assert head["hidden"].shape == (40, 32) and head["labels"].shape == (40,)
    assert torch.equal(head["weight"], model.lm_head.weight.detach())
    assert head["labels"].min() >= 0 and head["labels"].max() < model.config.vocab_size
    entropy = (head["hidden"] @ head["weight"].T).log_softmax(-1)
    mean = -(entropy.exp() * entropy).sum(-1).mean().item()
    assert f"'entropy, mean': {mean:.3f}"[:-1] in capsys.readouterr().out

    from benchmarks import inputs

    assert inputs.load(str(folder / "head.safetensors")).labels.dtype == torch.int64


@pytest.mark.parametrize(
    "options,message",
    [
        (("--column", "body"), "--column body: the data has text"),
        (("--tokens", "100000"), "--tokens and --length need"),
    ],
)
def test_mistakes_are_named(model_and_text, options, message, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        capture(monkeypatch, model_and_text[1], *options)


@pytest.mark.parametrize("vocab_size,hidden_size", [(32768, 256), (65536, 300)])
def test_the_synthetic_head_is_like_a_trained_one(vocab_size, hidden_size, monkeypatch):
    from benchmarks import inputs
    from benchmarks.models import capture_head

    head = inputs.synthetic_head(384, vocab_size, hidden_size)
    assert head.hidden.shape == (384, hidden_size) and head.weight.shape == (vocab_size, hidden_size)
    found = capture_head.statistics(vars(head))
    for name, value in inputs.TRAINED.items():
        assert 0.65 * value < found[name] < 1.6 * value, (name, found[name])
