"""What the tests of TRL's trainers train on, and how runs are compared. Works with every release since 0.24."""

import importlib
import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset

WORDS = "the cat dog bird sat ran flew on under over a red green mat tree house and then it was sad".split()
CLOCK = ("runtime", "per_second", "flos", "step_time")


def build_tokenizer():
    """One token a word; needs no network."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=list(specials.values())))
    names = ["input_ids", "attention_mask"]  # token types, which Llama's generate refuses, are in the default
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **specials)


def classes(kind: str):
    """(config, trainer): releases moved some to trl.experimental."""
    for place in ("trl", f"trl.experimental.{kind.lower()}"):
        try:
            module = importlib.import_module(place)
            return getattr(module, f"{kind}Config"), getattr(module, f"{kind}Trainer")
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this TRL has no {kind}Trainer")


def metrics(trainer) -> list[dict]:
    """What was logged at every step but the clock; the last entry sums the run up."""
    return [
        {name: float(value) for name, value in entry.items() if not any(word in name for word in CLOCK)}
        for entry in trainer.state.log_history[:-1]
    ]


def sentence(index: int, length: int) -> str:
    """The same words for the same arguments, whatever the state of the random generators."""
    return " ".join(WORDS[(index * 7 + k * (3 + index % 5)) % len(WORDS)] for k in range(length))


def preferences(count: int = 20) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": sentence(i, 3 + i % 4),
                "chosen": " " + sentence(i + 11, 4 + i % 7),
                "rejected": " " + sentence(i + 23, 3 + (i * 3) % 8),
            }
            for i in range(count)
        ]
    )


def unpaired() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(preferences())
        ]
    )


def texts() -> Dataset:
    return Dataset.from_list([{"text": sentence(i, 6 + i % 5)} for i in range(16)])


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": sentence(i, 4)} for i in range(8)])


def conversations() -> Dataset:
    def said(role: str, content: str) -> dict:
        return {"role": role, "content": content}

    return Dataset.from_list(
        [
            {"messages": [said("user", sentence(i, 3 + i % 4)), said("assistant", sentence(i + 9, 4 + i % 3))]}
            for i in range(12)
        ]
    )


# As the collators of the trainers that distill need one
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def teacher(vocab_size: int = 512, scale: float = 0.4):
    """Larger than the student of the fixtures, and surer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=scale,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def length_reward(completions, **_):
    return [float(len(set(completion.split()))) for completion in completions]


def largest_difference(ours: list[dict], theirs: list[dict]) -> float:
    assert len(ours) == len(theirs) > 0
    worst = 0.0
    for mine, other in zip(ours, theirs):
        assert mine.keys() == other.keys()
        for name in other:
            if name.endswith("rewards/accuracies") and abs(other[name.replace("accuracies", "margins")]) < 1e-4:
                continue  # policy and reference are still the same model: rounding decides who wins
            difference = abs(mine[name] - other[name])
            # Older KTO trainers log sums over the vocabulary, 512 logits of order 1 that nearly cancel
            scale = 512.0 if name.startswith("logits/") and abs(other[name]) > 20 else max(1.0, abs(other[name]))
            # GOLD rounds what it logs to four digits: a last one that differs is this much
            assert difference <= 1e-4 * scale + 1e-9, (name, mine[name], other[name])
            worst = max(worst, difference)
    return worst
