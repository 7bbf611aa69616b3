"""patch_trl against Axolotl itself: its DPO trainer is TRL's with methods of its own, none of which reads logits.

Last run with axolotl 0.19.0 and its pins trl 1.9.0, transformers 5.16.1, peft 0.20.0, datasets 4.8.4, torch 2.13.0 on
the CPU, without its CUDA packages; nothing is stubbed.
"""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("axolotl")
dpo = pytest.importorskip("axolotl.core.trainers.dpo")

from transformers import AutoModelForCausalLM, set_seed
from trl import DPOTrainer
from trl_runs import largest_difference, metrics, preferences

from fastdpo.integrations import patch_trl, trl_methods, unpatch_trl

CASES = {
    "sigmoid": {},
    "ipo": {"loss_type": ["ipo"]},
    "weighted": {"use_weighting": True},
    "padding free": {"padding_free": True},
    "label smoothing": {"label_smoothing": 0.1},
}


@pytest.fixture(autouse=True)
def unpatched():
    owned = {name: vars(DPOTrainer)[name] for name in trl_methods.METHODS["DPOTrainer"] if name in vars(DPOTrainer)}
    yield
    unpatch_trl()
    assert owned and all(vars(DPOTrainer)[name] is value for name, value in owned.items())


@pytest.fixture
def make(tokenizer, tiny_llama, tmp_path):
    path = str(tmp_path / "model")
    tiny_llama().save_pretrained(path)

    def build(**options):
        set_seed(3)
        arguments = dpo.DPOStrategy.get_training_args_class()(
            output_dir=str(tmp_path / "run"),
            max_steps=10,
            logging_steps=1,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=3,
            per_device_train_batch_size=4,
            **options,
        )
        return dpo.DPOStrategy.get_trainer_class()(
            model=AutoModelForCausalLM.from_pretrained(path),
            ref_model=AutoModelForCausalLM.from_pretrained(path),
            args=arguments,
            train_dataset=preferences(),
            processing_class=tokenizer,
        )

    return build


def test_the_methods_that_patch_trl_wraps_are_trls():
    trainer = dpo.DPOStrategy.get_trainer_class()
    known = [name for name in trl_methods.METHODS["DPOTrainer"] if name in vars(DPOTrainer)]
    assert known and all(getattr(trainer, name) is vars(DPOTrainer)[name] for name in known)


@pytest.mark.parametrize("case", CASES)
def test_parity(case, make, monkeypatch):
    theirs = make(**CASES[case])
    theirs.train()
    trainer = make(**CASES[case])  # made before patching
    patch_trl()
    patch_trl(backward="exact")
    multiplied, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (multiplied.append(len(w)), linear(x, w, b))[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    ours, theirs = metrics(trainer), metrics(theirs)
    print(f"{case}: largest metric difference {largest_difference(ours, theirs):.2g}")
    assert len(ours) == 10 and ours != theirs
    assert multiplied and 512 not in multiplied  # the head, never as logits
    assert not [w for w in caught if "needs the logits" in str(w.message)]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in ours)
