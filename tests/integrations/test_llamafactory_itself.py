"""LLaMA-Factory's own `run_exp` with and without the adapter, and the example, on a tiny model and data made here.

`make test-trainers TRAINERS=llamafactory` runs this with llamafactory 0.9.5, trl 0.24.0 and transformers 4.57.6. Its
import wants torchaudio, which no text needs: an empty module stands in.
"""

import importlib.machinery
import json
import os
import runpy
import sys
import types
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
pytest.importorskip("llamafactory")

import torch
from llamafactory.train.tuner import run_exp
from trl_runs import CLOCK, largest_difference, preferences

from fastdpo.integrations import llamafactory

EXAMPLES = Path(__file__).parents[2] / "examples" / "llamafactory"
CASES = {
    "sigmoid": {},
    "lora": {"finetuning_type": "lora", "lora_rank": 4},
    "cdpo, sft": {"dpo_label_smoothing": 0.1, "pref_ftx": 0.5},
    "ld": {"ld_alpha": 0.5},
    "ipo": {"pref_loss": "ipo"},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "kto": {"stage": "kto", "dataset": "unpaired"},
}


@pytest.fixture
def arguments(tokenizer, tiny_llama, tmp_path) -> dict:
    """What every run has in common."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    paired = [
        {"instruction": row["prompt"], "input": "", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in preferences()
    ]
    unpaired = [
        {"instruction": row["prompt"], "input": "", "output": row["chosen"], "kto_tag": i % 2 == 0}
        for i, row in enumerate(preferences())
    ]
    columns = {"prompt": "instruction", "query": "input"}
    info = {
        "paired": {
            "file_name": "paired.json",
            "ranking": True,
            "columns": {**columns, "chosen": "chosen", "rejected": "rejected"},
        },
        "unpaired": {
            "file_name": "unpaired.json",
            "columns": {**columns, "response": "output", "kto_tag": "kto_tag"},
        },
    }
    for name, content in (("paired", paired), ("unpaired", unpaired), ("dataset_info", info)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(tmp_path / "model"),
        "template": "empty",
        "dataset": "paired",
        "dataset_dir": str(tmp_path),
        "cutoff_len": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "output_dir": str(tmp_path / "output"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "save_steps": 1000,
        "overwrite_cache": True,
        "disable_tqdm": True,
    }


def history(output: str) -> list[dict]:
    """What was logged at every step but the clock; the last entry sums the run up."""
    entries = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"][:-1]
    return [
        {name: float(value) for name, value in entry.items() if not any(word in name for word in CLOCK)}
        for entry in entries
    ]


@pytest.fixture
def heads(monkeypatch) -> list:
    """Shapes that were multiplied with an lm_head of 512 rows."""
    linear, seen = torch.nn.functional.linear, []

    def spy(hidden, weight, bias=None):
        if weight.shape[0] == 512:
            seen.append(hidden.shape)
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    return seen


@pytest.fixture(autouse=True)
def unpatched():
    yield
    llamafactory.unpatch()


@pytest.mark.parametrize("case", CASES)
def test_parity(case, arguments, heads):
    def train(name: str) -> list[dict]:
        output = {"output_dir": f"{arguments['output_dir']}-{name}"}  # it resumes what it finds
        run_exp(arguments | CASES[case] | output)
        return history(output["output_dir"])

    theirs = train("theirs")
    assert heads
    heads.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        llamafactory.patch(backward="exact")
        ours = train("ours")
    assert len(ours) == 10 and not heads
    print(f"LLaMA-Factory {case}: largest metric difference {largest_difference(ours, theirs):.2g}")
    assert ours != theirs  # its sums are in another order: it took part
    assert not [w for w in caught if "needs the logits" in str(w.message)]


def test_the_example(arguments, heads, monkeypatch):
    """examples/llamafactory/train.py and dpo.yaml, as the README calls them, with another model and data."""
    different = {name: value for name, value in arguments.items() if name not in ("stage", "do_train", "report_to")}
    words = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in different.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", str(EXAMPLES / "dpo.yaml"), *words])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    logged = history(arguments["output_dir"])
    assert len(logged) == 10 and not heads
    assert logged[-1]["rewards/margins"] > logged[0]["rewards/margins"]
