"""The examples, run as users run them, on a model and data made here."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
from safetensors.torch import load_file

import fastdpo

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs one script in this process; returns what it printed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastdpo.demo.setup import build_tokenizer, load_preferences, texts_of

    data = ROOT / "fastdpo" / "demo" / "data" / "preferences.jsonl"
    tokenizer = build_tokenizer(texts_of(load_preferences(str(data)).select(range(50))), 512)
    tokenizer.save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")

    def run(script: str, *arguments: str) -> str:
        common = ("--model", str(tmp_path / "model"), "--data", str(data), "--steps", "6", "--learning-rate", "5e-3")
        monkeypatch.setattr(sys, "argv", [script, *common, *arguments])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    fastdpo.unpatch_trl()


def test_plain_loop(run):
    lines = run("plain_loop.py").splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines if line.startswith("step")]
    assert len(losses) == 6
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are the same model: log 2
    assert min(losses[3:]) < 0.68


def test_trl_full(run, tmp_path):
    assert "rewards/margins" in run("trl_dpo.py")
    trained, given = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dpo_output", "model"))
    assert any((trained[name] != given[name]).any() for name in given)


def test_trl_lora(run, tmp_path):
    assert "rewards/margins" in run("trl_dpo.py", "--lora", "4")
    adapter = load_file(tmp_path / "dpo_output" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in adapter)
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)  # B starts at zero


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_distill(kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--kind", kind, "--steps", "24", "--batch-size", "8"])
    runpy.run_path(str(EXAMPLES / "distill.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    divergences = [float(line.split("divergence ")[1].split(",")[0]) for line in lines]
    assert len(divergences) == 24
    assert max(divergences[-4:]) < 0.85 * min(divergences[:4]) and min(divergences) > 0


@pytest.mark.parametrize(
    ("name", "kind", "section", "expected"),
    [
        ("fsdp2.yaml", "FSDP", "fsdp_config", {"fsdp_version": 2}),
        ("zero3.yaml", "DEEPSPEED", "deepspeed_config", {"zero_stage": 3}),
    ],
)
def test_accelerate_knows_the_configurations(name, kind, section, expected):
    """What they train like is in distributed/test_trl.py and integrations/test_deepspeed.py."""
    from accelerate.commands.config.config_args import load_config_from_file  # raises for a key it does not know

    config = load_config_from_file(str(EXAMPLES / "accelerate" / name))
    assert config.distributed_type == kind and expected.items() <= getattr(config, section).items()
