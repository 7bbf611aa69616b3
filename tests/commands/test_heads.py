"""Heads to look at: from files, and from a local model."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fastdpo.commands.heads import checked, from_file, from_model, texts_of

safetensors = pytest.importorskip("safetensors.torch")


def saved(tmp_path, **tensors) -> str:
    file = tmp_path / "head.safetensors"
    safetensors.save_file({name: x.contiguous() for name, x in tensors.items()}, file)
    return str(file)


def good(**changed) -> dict[str, torch.Tensor]:
    labels = torch.tensor([1, -100, 3, 0, 299, -100], dtype=torch.int32)
    return {"hidden": torch.randn(6, 8), "weight": torch.randn(300, 8), "labels": labels} | changed


def test_a_file_without_its_ignored_tokens(tmp_path):
    tensors = good()
    head = from_file(saved(tmp_path, **tensors))
    assert head.labels.tolist() == [1, 3, 0, 299] and head.labels.dtype == torch.int64
    assert torch.equal(head.hidden, tensors["hidden"][[0, 2, 3, 4]]) and head.bias is None
    assert head.some(2).labels.tolist() == [1, 299] and torch.equal(head.some(2).hidden, head.hidden[[0, 3]])
    assert head.some(100).labels.tolist() == head.labels.tolist()
    assert from_file(saved(tmp_path, **tensors, bias=torch.zeros(300))).bias.shape == (300,)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"hidden": torch.randn(6, 9)}, r"got hidden \(6, 9\), weight \(300, 8\), labels \(6,\)"),
        ({"hidden": torch.randn(2, 6, 8)}, r"must hold hidden \[N, H\]"),
        ({"weight": torch.zeros(300, 8, dtype=torch.int64)}, "weight must be fp32, bf16, fp16 or fp64"),
        ({"labels": torch.randn(6)}, "labels must be integers; got torch.float32"),
        ({"labels": torch.tensor([1, 2, 3, 4, 5, 300])}, r"labels must lie in \[0, 300\); got 1 to 300"),
        ({"labels": torch.full((6,), -100)}, "at least 2 labels that are not -100; got 0"),
        ({"bias": torch.zeros(5)}, r"bias must be \[V\]; got \(5,\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        from_file(saved(tmp_path, **good(**changed)))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        from_file(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="has no weight and no labels: it has hidden"):
        from_file(saved(tmp_path, hidden=torch.zeros(2, 2)))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        from_file(str(tmp_path / "text"))


def test_texts(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"text": "t"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}]},
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert texts_of(str(file), None) == [("p", "c"), ("p", "r"), ("", "t"), ("q", "a")]
    plain = tmp_path / "d.txt"
    plain.write_text("one\ntwo\n\n\nthree\n")
    assert [part.strip() for _, part in texts_of(str(plain), None)] == ["one\ntwo", "three"]
    for line, message in (
        ("{", "line 1 is no JSON"), ("[]", "line 1 must be an object; got list"), ('{"x": 1}', "it has x"),
        ('{"text": 7}', "a string or a list of messages; got int"),
    ):  # fmt: skip
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            texts_of(str(file), None)
    with pytest.raises(ValueError, match="there is no such file"):
        texts_of(str(tmp_path / "none"), None)


def test_packages_that_are_not_there_are_named(monkeypatch):
    for package in ("safetensors", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        from_file("head.safetensors")
    with pytest.raises(ImportError, match="pip install transformers"):
        from_model(".", "data.txt", 9, 9, "cpu", print)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from fastdpo.demo.setup import build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(["a b c d e " * 9, "the cat sat on the mat. " * 9], 300).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=5.0, query_pre_attn_scalar=16, pad_token_id=0,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_models_completions(model_folder, tmp_path):
    """Their log-probs by hidden states, weight and transform are the model's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"prompt": "the cat ", "chosen": "sat on the mat."}) + "\n")
    said = []
    head = from_model(str(model_folder), str(data), 100, 64, "cpu", said.append)
    assert said[0] == "loading the model" and len(said) == 2 and data.name in head.name
    tokenizer, model = (x.from_pretrained(model_folder) for x in (AutoTokenizer, AutoModelForCausalLM))
    prompt, completion = (tokenizer(x)["input_ids"] for x in ("the cat ", "sat on the mat."))
    ids = torch.tensor([prompt + completion + [tokenizer.eos_token_id]])
    assert head.labels.tolist() == ids[0, len(prompt) :].tolist()
    with torch.no_grad():
        theirs = model.eval()(ids).logits[0, len(prompt) - 1 : -1].float()
    scale, softcap, temperature = head.transform
    assert softcap == 5.0
    ours = softcap * torch.tanh(scale * (head.hidden @ head.weight.T) / softcap) / temperature
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(from_model(str(model_folder), str(data), 100, len(prompt) + 3, "cpu", said.append).labels) == 3


def test_models_that_are_none(model_folder, tmp_path):
    data = tmp_path / "d.txt"
    data.write_text("x")
    with pytest.raises(ValueError, match="only local files are read, no hub"):
        from_model("gpt2/none", str(data), 9, 9, "cpu", print)
    with pytest.raises(ValueError, match="cannot be loaded"):
        from_model(str(tmp_path), str(data), 9, 9, "cpu", lambda _: None)
    data.write_text("\n\n")
    with pytest.raises(ValueError, match="has no text of two tokens or more"):
        from_model(str(model_folder), str(data), 9, 9, "cpu", lambda _: None)


def test_tokens_keep_their_order():
    hidden = torch.arange(20.0).view(10, 2)
    head = checked("x", hidden, torch.zeros(4, 2), torch.arange(10) % 4)
    assert head.some(5).hidden[:, 0].tolist() == sorted(head.some(5).hidden[:, 0].tolist())
