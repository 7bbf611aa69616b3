"""`python -m fastdpo plan`: its table is the models' figures, and says what they are worth."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from fastdpo.__main__ import main
from fastdpo.commands.plan import NAMES, chosen_gpu
from fastdpo.costs import times
from fastdpo.costs.gpus import GPUS
from fastdpo.costs.memory import GIB, PATHS, Batch, longest, peak

SIZES = ["--vocab", "32000", "--hidden-size", "1024", "--tokens", "2048"]


def planned(capsys, *arguments: str) -> tuple[str, dict[str, list[str]]]:
    """(all that is printed, a path's cells)."""
    assert main(["plan", *arguments]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    cells = {}
    for path, name in NAMES.items():
        (line,) = [line for line in text.splitlines() if re.match(rf"{re.escape(name)} +[\d.]+ ", line)]
        cells[path] = line[len(name) :].replace(">=", "").split()
    return text, cells


def test_a_gpu(capsys):
    pytest.importorskip("triton")
    text, cells = planned(capsys, *SIZES, "--gpu", "h200", "--memory", "4")
    batch, gpu = Batch(2048, 32000, 1024), GPUS["H200"]
    assert set(cells) == set(PATHS)
    for path, (total, on_top, milliseconds, over, tokens, sequence) in cells.items():
        assert float(total) == pytest.approx(peak(path, batch) / GIB, abs=0.006)
        assert float(on_top) == pytest.approx(PATHS[path].growth(batch) / GIB, abs=0.006)
        seconds = times.expected(path, batch, gpu)
        assert float(milliseconds) == pytest.approx(seconds * 1e3, abs=0.006)
        assert float(over) == pytest.approx(seconds / times.two_products(batch, gpu), abs=0.006)
        assert int(tokens.replace(",", "")) == longest(path, batch, 4 * GIB)
        assert int(sequence.replace(",", "")) == round(longest(path, batch, 4 * GIB) / 2)
    assert "MODELLED for an H200, not measured" in text
    assert "never measured on a GPU" in text and "huggingface/trl#7244" in text
    assert all(f"{NAMES[path]} {PATHS[path].error:.0%}" in text for path in PATHS)


def test_a_cpu_has_memory_and_no_times(capsys):
    text, cells = planned(
        capsys, *SIZES, "--gpu", "none", "--dtype", "float32", "--prompt-share", "0.5", "--pairs", "2", "--frozen"
    )
    batch = Batch(2048, 32000, 1024, 4, 4096, 2, True, True, False)
    for path, found in cells.items():
        assert found == [f"{peak(path, batch) / GIB:.2f}", f"{PATHS[path].growth(batch) / GIB:.2f}"]
    assert "MODELLED for a CPU" in text and "time ms" not in text and "head frozen" in text
    assert "2048 completion tokens and 2048 of prompts, 2 preference pairs, with a reference" in text


def test_what_was_not_measured_is_said(capsys):
    text, _ = planned(capsys, *SIZES, "--gpu", "none", "--dtype", "float16")
    assert "In float16 it was not measured" in text
    text, _ = planned(capsys, *SIZES, "--gpu", "none")
    assert "not measured." not in text.partition("memory  ")[2]
    text, _ = planned(capsys, *SIZES, "--gpu", "A100", "--dtype", "float32", "--no-reference")
    assert "no times in float32" in text and "time ms" not in text and "without a reference" in text


def test_nothing_fits(capsys):
    _, cells = planned(capsys, *SIZES, "--gpu", "none", "--memory", "0.01")
    assert all(found[-2:] == ["none", "none"] for found in cells.values())


def test_a_models_config(capsys, tmp_path):
    config = {"vocab_size": 1000, "architectures": ["TinyForCausalLM"], "torch_dtype": "float16", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    text, _ = planned(capsys, "--model", str(tmp_path), "--tokens", "100", "--gpu", "none")
    assert "TinyForCausalLM: V = 1000, H = 64, float16, head trained, tied to the embedding" in text
    text, _ = planned(capsys, "--model", str(tmp_path), "--tokens", "100", "--gpu", "none", "--dtype", "float32")
    assert "H = 64, float32" in text


def test_without_triton_the_rest_is_there(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdpo.ops.triton.launch", None)
    text, cells = planned(capsys, *SIZES, "--gpu", "H100")
    assert "note      fastdpo's time is counted from its Triton launches: pip install triton" in text
    assert cells["fastdpo exact"][2:4] == ["-", "-"] and float(cells["trl"][2]) > 0


def test_which_gpu():
    assert chosen_gpu("none") == (None, None, "")
    assert chosen_gpu("rtx 4090")[:2] == ("RTX 4090", 24)
    if not torch.cuda.is_available():
        assert chosen_gpu(None) == ("H100", 80, "there is none here; --gpu chooses another")


def test_the_gpu_that_is_here(monkeypatch):
    class Properties:
        name, total_memory = "NVIDIA A100-SXM4-40GB", 40 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert chosen_gpu(None) == ("A100", 40, "found here: NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(Properties, "name", "NVIDIA T4")
    with pytest.raises(ValueError, match=r"no rates are known of the GPU 'NVIDIA T4'.*--gpu none"):
        chosen_gpu(None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "8"], "--vocab and --hidden-size missing: give --model"),
        (["--tokens", "8", "--vocab", "9"], "--hidden-size missing"),
        (["--tokens", "8", "--vocab", "9", "--model", "x"], "--model says V and H"),
        (["--tokens", "0", "--vocab", "9", "--hidden-size", "8"], "--tokens must be positive; got 0"),
        (["--tokens", "8", "--vocab", "-9", "--hidden-size", "8"], "--vocab must be positive; got -9"),
        ([*SIZES, "--memory", "nan"], "--memory must be positive; got nan"),
        ([*SIZES, "--pairs", "0"], "--pairs must be positive; got 0"),
        ([*SIZES, "--prompt-share", "1"], r"--prompt-share must lie in [0, 1); got 1.0"),
        ([*SIZES, "--gpu", "T4"], "no rates are known of the GPU 'T4'; known are A100"),
        (["--model", "nowhere/at-all", "--tokens", "8"], "--model nowhere/at-all: there is no"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
