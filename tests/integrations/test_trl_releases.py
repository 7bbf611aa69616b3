"""patch_trl with whatever TRL is installed: `make test-trl` runs this file in one environment per release.

Each trainer with and without it, same seeds, step by step; and what people do with trainers meanwhile.
"""

import pickle
import warnings

import pytest
import torch

trl = pytest.importorskip("trl", minversion="0.24")
pytest.importorskip("peft")

from peft import LoraConfig
from trl.trainer import utils as trl_utils
from trl_runs import classes, largest_difference, length_reward, metrics, preferences, prompts, texts, unpaired

from fastdpo.integrations import patch_trl, trl_methods, unpatch_trl
from fastdpo.integrations.trl_release import release

TAKES_LOGITS = release() < (1, 15)
ROLLOUT = {"num_generations": 2, "max_completion_length": 6, "beta": 0.04}
REWARD = {"trainer_options": {"reward_funcs": lambda: length_reward}}
LORA = {"trainer_options": {"peft_config": lambda: LoraConfig(r=4, target_modules="all-linear")}}
CASES = {
    "dpo": ("DPO", preferences, {}),
    "dpo lora": ("DPO", preferences, LORA),
    "dpo wpo": ("DPO", preferences, {"use_weighting": True}),
    "dpo ld": ("DPO", preferences, {"ld_alpha": 0.5}),
    "dpo mixed": ("DPO", preferences, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "dpo precomputed": ("DPO", preferences, {"precompute_ref_log_probs": True}),
    "kto": ("KTO", unpaired, {}),
    "sft": (
        "SFT",
        texts,
        {"loss_type": "nll"} if TAKES_LOGITS else {},
    ),  # their other one, chunked_nll, makes no logits
    "grpo": ("GRPO", prompts, ROLLOUT | REWARD),
    "rloo": ("RLOO", prompts, ROLLOUT | REWARD),
    "cpo": ("CPO", preferences, {}),
    "simpo": ("CPO", preferences, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": ("ORPO", preferences, {}),
}
if release() == (1, 8):  # which looks for its cache where a data set in memory has none, also unpatched
    del CASES["dpo precomputed"]


def replaced() -> dict:
    """Every object that patch_trl may replace."""
    owners = [owner for name in trl_methods.METHODS for owner, _ in trl_methods.methods_of(name)]
    objects = {(owner, name): value for owner in owners for name, value in vars(owner).items()}
    return objects | {
        (module, name): value for module in trl_methods.trl_modules() for name, value in vars(module).items()
    }


@pytest.fixture(autouse=True)
def unpatched():
    unpatch_trl()
    originals = replaced()
    yield
    unpatch_trl()
    now = replaced()
    assert {key for key, value in originals.items() if now[key] is not value} == set()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parity(case, train):
    kind, dataset, config = CASES[case]
    theirs = train(kind, dataset(), 10, **config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch_trl(backward="exact")
        ours = train(kind, dataset(), 10, **config)
    print(f"TRL {trl.__version__} {case}: largest metric difference {largest_difference(ours, theirs):.2g}")
    assert ours != theirs  # its sums are in another order: it took part
    assert not [w for w in caught if "needs the logits" in str(w.message)]
    assert any(entry.get("grad_norm", 0) > 0 for entry in ours)


def test_logits_never_exist(train, monkeypatch):
    """Not even once: the head's own product is not called while a trainer that takes logits trains."""
    linear, rows = torch.nn.functional.linear, []

    def spy(hidden, weight, bias=None):
        if weight.shape[0] == 512:
            rows.append(hidden.shape)
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    kind = "DPO" if TAKES_LOGITS else "CPO"
    train(kind, preferences(), 1)
    assert rows
    rows.clear()
    patch_trl()
    train(kind, preferences(), 2)
    assert not rows


LIFE = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "evaluation": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "trainer_options": {"eval_dataset": lambda: preferences(6)},
    },
}
KINDS = ("DPO", "CPO")


LIVES = [(life, kind) for life in LIFE for kind in KINDS if life != "torch.compile" or kind == "CPO"]  # 20 s


@pytest.mark.slow
@pytest.mark.parametrize(("life", "kind"), LIVES)
def test_life(life, kind, train):
    config = LIFE[life]
    theirs = train(kind, preferences(), 4, **config)
    patch_trl(backward="exact")
    ours = train(kind, preferences(), 4, **config)
    largest_difference(ours, theirs)
    assert ours != theirs
    assert life != "evaluation" or any("eval_rewards/margins" in entry for entry in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_after_construction_twice_and_pickled(kind, make_trainer):
    reference = make_trainer(kind, preferences(), 3)
    reference.train()
    trainer = make_trainer(kind, preferences(), 3)
    patch_trl()
    patch_trl(backward="exact")
    assert pickle.loads(pickle.dumps(classes(kind)[1])) is classes(kind)[1]
    trainer.train()
    largest_difference(metrics(trainer), metrics(reference))
    try:
        pickle.dumps(reference.model)
    except (AttributeError, pickle.PicklingError):  # some releases give their models a forward that no pickle takes
        pass
    else:
        model = pickle.loads(pickle.dumps(trainer.model))
        ids = torch.arange(6)[None]
        assert torch.equal(model(ids).logits, trainer.model(ids).logits)
    unpatch_trl()
    assert "forward" not in trainer.model.get_output_embeddings().__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_and_resume(kind, make_trainer, tmp_path):
    whole = make_trainer(kind, preferences(), 4)
    whole.train()
    patch_trl(backward="exact")
    first = make_trainer(kind, preferences(), 4, save_strategy="steps", save_steps=2)
    first.train()
    second = make_trainer(kind, preferences(), 4)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    losses = [entry["loss"] for entry in metrics(second) if "loss" in entry]
    assert losses == pytest.approx([entry["loss"] for entry in metrics(whole)], rel=1e-4, abs=1e-4)


@pytest.mark.skipif(not hasattr(trl_utils, "selective_log_softmax"), reason="no functions of logits")
def test_a_trainer_without_the_methods_is_refused(monkeypatch):
    monkeypatch.setitem(trl_methods.METHODS, "CPOTrainer", ("forward_of_another_release",))
    before = trl_utils.selective_log_softmax
    with pytest.raises(RuntimeError, match="forward_of_another_release"):
        patch_trl()
    assert trl_utils.selective_log_softmax is before
