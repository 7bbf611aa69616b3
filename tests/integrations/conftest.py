"""Trainers of TRL on a tiny model that needs no network."""

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    from trl_runs import build_tokenizer

    return build_tokenizer()


@pytest.fixture
def make_trainer(tokenizer, tiny_llama, tmp_path):
    """Builds a fresh TRL trainer of one kind on the same tiny model, read from disk as users' are."""
    from transformers import AutoModelForCausalLM, set_seed
    from trl_runs import classes

    path = str(tmp_path / "model")
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)

    def make(kind: str, dataset, steps: int, trainer_options: dict | None = None, **config):
        config_class, trainer_class = classes(kind)
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": steps,
            "logging_steps": 1,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 3,
            "per_device_train_batch_size": 4,
        }
        args = config_class(**(defaults | config))
        set_seed(3)  # an adapter is drawn before the trainer sets its own
        options = {name: make() for name, make in (trainer_options or {}).items()}
        model = AutoModelForCausalLM.from_pretrained(path)
        if kind in ("DPO", "KTO") and "peft_config" not in options and "precompute_ref_log_probs" not in config:
            options["ref_model"] = AutoModelForCausalLM.from_pretrained(path)
        options = {"processing_class": tokenizer} | options
        return trainer_class(model=model, args=args, train_dataset=dataset, **options)

    return make


@pytest.fixture
def train(make_trainer):
    """Runs such a trainer; returns the metrics it logged at every step."""
    from trl_runs import metrics

    def run(*args, **config):
        trainer = make_trainer(*args, **config)
        trainer.train()
        return metrics(trainer)

    return run
