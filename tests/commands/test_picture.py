"""`python -m fastdpo picture`."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.inputs import synthetic_head
from fastdpo.__main__ import main
from fastdpo.commands import picture

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def head_file(tmp_path_factory) -> str:
    made = synthetic_head(64, 4096, 256)
    file = tmp_path_factory.mktemp("head") / "mine.safetensors"
    tensors = {"hidden": made.hidden.bfloat16(), "weight": made.weight.bfloat16(), "labels": made.labels}
    safetensors.save_file(tensors, file)
    return str(file)


def test_a_table_and_a_picture(head_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "mine.png"
    arguments = ["--head", head_file, "--tokens", "48", "--seeds", "1", "--device", "cpu", "--output", str(output)]
    assert main(["picture", *arguments, "--tau", "0.03", "0.01", "0.0009765625"]) == 0
    text = capsys.readouterr().out
    assert "mine.safetensors: 48 tokens, V = 4096 (32 blocks), H = 256, bfloat16" in text
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    wide, narrow = rows["tau 0.03"], rows["tau 0.01"]
    assert float(wide[2]) < float(narrow[2])  # blocks a token
    assert float(wide[5].rstrip("x")) > float(narrow[5].rstrip("x")) > 1  # speed-up
    assert float(wide[7]) > float(narrow[7]) > 0  # error of dhidden
    assert rows["tau 2^-10 (default)"][6:9] == ["exact", "exact", "0.0e+00"]  # a vocabulary of 32 blocks has no tail
    assert "bf16 logits" in rows and "counted in passes, not timed" in text
    data = output.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    assert text.splitlines()[-1] == str(output)


def test_without_matplotlib_the_table_is_there_and_the_remedy(head_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["picture", "--head", head_file, "--tokens", "32", "--seeds", "1", "--device", "cpu", "--tau", "0.01"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "pip install matplotlib, or --no-picture" in captured.err and captured.out == ""
    assert main([*arguments, "--no-picture"]) == 0
    assert "tau 0.01" in capsys.readouterr().out


def test_a_flat_head_is_said_to_go_the_exact_way(tmp_path, capsys):
    file = tmp_path / "flat.safetensors"
    tensors = {"hidden": torch.zeros(8, 16), "weight": torch.randn(2048, 16), "labels": torch.arange(8)}
    safetensors.save_file(tensors, file)
    assert main(["picture", "--head", str(file), "--no-picture", "--device", "cpu", "--tau", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "note: 512 tokens were asked for, and there are 8" in text
    assert "exact            at tau 0.001 so many blocks are live that fastdpo takes its exact path here" in text
    assert "bf16 logits" not in text.partition("\n\n")[2].partition("\n\n")[0]  # these are fp32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "x"], "--data FILE, a text for the model is missing"),
        (["--head", "x", "--data", "y"], "--model PATH is missing"),
        (["--head", "x", "--tokens", "1"], "--tokens must be at least 2; got 1"),
        (["--head", "x", "--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--head", "x", "--tau", "2"], r"--tau must lie in (0, 1]; got 2.0"),
        (["--head", "x", "--tau", "0"], "--tau must be a finite number > 0; got 0"),
        (["--head", "x", "--tau", "nan"], "--tau must be a finite number"),
        (["--head", "x", "--output", "/no/where/at.png"], "--output /no/where/at.png: there is no folder /no/where"),
        (["--head", "nowhere"], "--head nowhere: there is no such file"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    pytest.importorskip("matplotlib")
    assert main(["picture", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["picture", "--head", "x", "--device", "cuda", "--no-picture"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_the_defaults_are_among_the_tau():
    from fastdpo.head import DEFAULT_TAU, FROZEN_HEAD_TAU

    assert {DEFAULT_TAU, FROZEN_HEAD_TAU} <= set(picture.TAUS)
