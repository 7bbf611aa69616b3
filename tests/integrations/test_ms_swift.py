"""The adapter of ms-swift against ms-swift itself: its own `rlhf_main`, with and without.

Last run with ms-swift 4.6.0, trl 0.29.1, transformers 4.57.6, peft 0.20.0, datasets 4.8.4, torch 2.13.0 on the CPU.
"""

import json
import warnings

import pytest
from torch import nn

pytest.importorskip("swift")

from swift import RLHFArguments, rlhf_main
from trl_runs import largest_difference, preferences

from fastdpo.integrations import ms_swift

CLOCK = ("elapsed_time", "remaining_time", "global_step/max_steps", "train_speed(s/it)", "memory(GiB)")
CASES = {
    "dpo": {},
    "dpo lora": {"tuner_type": "lora", "target_modules": ["all-linear"]},
    "dpo ld": {"ld_alpha": 0.5},
    "dpo rpo": {"rpo_alpha": 0.5},
    "dpo accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "cpo": {},
    "simpo": {},
    "orpo": {},
    "kto": {},
}


@pytest.fixture
def train(tiny_llama, tokenizer, tmp_path):
    model = str(tmp_path / "model")
    tiny_llama().save_pretrained(model)
    tokenizer.save_pretrained(model)

    def run(kind, steps=10, **options):
        rows = []
        for i, pair in enumerate(preferences()):
            answer, extra = pair["chosen"], {"label": i % 2 == 0} if kind == "kto" else {}
            if kind != "kto":
                extra["rejected_response"] = pair["rejected"]
            asked = {"role": "user", "content": pair["prompt"]}
            rows.append({"messages": [asked, {"role": "assistant", "content": answer}]} | extra)
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        defaults = {
            "tuner_type": "full",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": ["none"],
            "torch_dtype": "float32",
            "attn_impl": "eager",
            "use_cpu": True,
            "gradient_checkpointing": False,
            "split_dataset_ratio": 0.0,
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "load_from_cache_file": False,
            "use_hf": True,
            "check_model": False,
            "seed": 3,
            "data_seed": 3,
        }
        arguments = RLHFArguments(
            rlhf_type=kind,
            model=model,
            model_type="llama",
            template="dummy",
            dataset=[str(data)],
            output_dir=str(tmp_path / "run"),
            **(defaults | options),
        )
        history = rlhf_main(arguments)["log_history"][:-1]
        assert len(history) == steps
        return [{name: float(x) for name, x in entry.items() if name not in CLOCK} for entry in history]

    return run


def replaced():
    found = {}
    for owner, names in ms_swift._adapter._owners():
        found |= {(owner, name): vars(owner)[name] for name in names}
    return found | {(module, name): vars(module)[name] for module, name, _ in ms_swift._adapter._functions()}


@pytest.fixture(autouse=True)
def unpatched():
    originals = replaced()
    yield
    ms_swift.unpatch()
    assert all(replaced()[key] is value for key, value in originals.items())


@pytest.mark.parametrize("case", CASES)
def test_parity(case, train, monkeypatch):
    kind = case.split()[0]
    theirs = train(kind, **CASES[case])
    ms_swift.patch()
    ms_swift.patch(backward="exact")
    multiplied, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (multiplied.append(len(w)), linear(x, w, b))[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = train(kind, **CASES[case])
    print(f"{case}: largest metric difference {largest_difference(ours, theirs):.2g}")
    assert multiplied and 512 not in multiplied  # the head, never as logits
    assert not [w for w in caught if "needs the logits" in str(w.message)]
    assert ours != theirs and all(entry["grad_norm"] > 0 for entry in ours)


def test_options_and_other_releases(monkeypatch):
    with pytest.raises(TypeError, match="backwards"):
        ms_swift.patch(backwards="exact")
    from swift.rlhf_trainers import kto_trainer, rlhf_mixin

    before = replaced()
    with monkeypatch.context() as m:
        m.delattr(kto_trainer.KTOTrainer, "_compute_kl_logps")
        with pytest.raises(RuntimeError, match="_compute_kl_logps"):
            ms_swift.patch()
    with monkeypatch.context() as m:
        m.delattr(rlhf_mixin, "selective_log_softmax")
        with pytest.raises(RuntimeError, match="selective_log_softmax"):
            ms_swift.patch()
    assert all(replaced()[key] is value for key, value in before.items())


def test_after_construction(train, monkeypatch):
    """The methods are looked up when they run: patched in the middle of a run, they take part from there on."""
    from swift.rlhf_trainers.dpo_trainer import DPOTrainer

    theirs, products = train("dpo", 4), []
    linear, step = nn.functional.linear, DPOTrainer.training_step

    def counting(x, weight, bias=None):
        products[-1] += len(weight) == 512
        return linear(x, weight, bias)

    def patching(self, *args, **kwargs):
        products.append(0)
        if len(products) == 3:
            ms_swift.patch(backward="exact")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "linear", counting)
    monkeypatch.setattr(DPOTrainer, "training_step", patching)
    largest_difference(train("dpo", 4), theirs)
    assert products == [2, 2, 0, 0]  # policy and reference
