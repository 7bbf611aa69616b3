"""What TRL's tests take from the Hub, under the same names, made here: text models of a few layers, a tokenizer of
bytes and words, and the data sets called "zen". No test of TRL asks what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path

OWNER = "trl-internal-testing"
WORDS = (
    "the cat dog bird sat ran flew on under over a red green mat tree house and then it was sad is better than".split()
)
VOCAB = 1100  # nine blocks, the last one not full
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.2,  # logits of order 1, so that a wrong transform of them shows
)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
# Name on the Hub -> architecture, and what its configuration has beside SIZES
MODELS = {
    "tiny-CohereForCausalLM": ("Cohere", {"logit_scale": 0.25}),
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 0.25}),
    "tiny-GemmaForCausalLM": ("Gemma", {}),
    "tiny-Gemma2ForCausalLM": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "tiny-GptOssForCausalLM": ("GptOss", EXPERTS),
    "tiny-LlamaForCausalLM-3": ("Llama", {}),
    "tiny-LlamaForCausalLM-3.1": ("Llama", {}),
    "tiny-LlamaForCausalLM-3.2": ("Llama", {"tie_word_embeddings": True}),
    "tiny-MistralForCausalLM-0.1": ("Mistral", {}),
    "tiny-MistralForCausalLM-0.2": ("Mistral", {}),
    "tiny-Olmo3ForCausalLM": ("Olmo3", {}),
    "tiny-Phi3ForCausalLM-3": ("Phi3", {}),
    "tiny-Phi3ForCausalLM-3.5": ("Phi3", {}),
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "tiny-Qwen3ForCausalLM": ("Qwen3", {"tie_word_embeddings": True}),
    "tiny-Qwen3ForCausalLM-Instruct-2507": ("Qwen3", {"tie_word_embeddings": True}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", EXPERTS),
    "tiny-T5ForConditionalGeneration": (
        "T5",
        dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
}

MADE_OF = Path(__file__).read_text()  # what changes here is made again


def use(home: Path) -> None:
    """From now on what is asked of the Hub comes from `home`. Before huggingface_hub is imported."""
    os.environ.update(HF_HOME=str(home), HF_HUB_CACHE=str(home / "hub"), HF_HUB_OFFLINE="1")
    if not (home / "made").exists() or (home / "made").read_text() != MADE_OF:
        for name, (architecture, more) in MODELS.items():
            _make(home / "hub" / f"models--{OWNER}--{name}", architecture, more)
        (home / "made").write_text(MADE_OF)
    import datasets

    datasets.load_dataset = load_dataset


def _make(folder: Path, architecture: str, more: dict) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = {"vocab_size": VOCAB} if architecture == "T5" else SIZES
    config = getattr(transformers, f"{architecture}Config")(**sizes, **tokens, **more)
    model = getattr(transformers, folder.name.split("--tiny-")[1].split("-")[0])(config)
    snapshot = folder / "snapshots" / "0"
    model.save_pretrained(snapshot)
    _tokenizer().save_pretrained(snapshot)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("0")


def _tokenizer():
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # Of bytes, as Qwen2's, whose class takes the vocabulary and builds all else itself
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [*special.values(), "<|im_start|>"]
    trainer = trainers.BpeTrainer(special_tokens=specials, vocab_size=VOCAB, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    names = ["input_ids", "attention_mask"]
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **special)
    made.chat_template = (Path.cwd() / "trl" / "chat_templates" / "qwen2_5.jinja").read_text()
    return made


def _sentence(index: int, length: int) -> str:
    return " ".join(WORDS[(index * 7 + k * (3 + index % 5)) % len(WORDS)] for k in range(length))


def _row(kind: str, i: int) -> dict:
    conversational, _, form = kind.partition("_")
    said = {
        "prompt": _sentence(i, 3 + i % 4),
        "good": _sentence(i + 11, 4 + i % 7),
        "bad": _sentence(i + 23, 3 + i * 3 % 8),
    }
    prompt, good, bad = said["prompt"], " " + said["good"], " " + said["bad"]
    text = prompt + good
    if conversational == "conversational":
        prompt = [{"role": "user", "content": said["prompt"]}]
        good, bad = ([{"role": "assistant", "content": said[x]}] for x in ("good", "bad"))
    return {
        "language_modeling": {"messages": [*prompt, *good]} if isinstance(prompt, list) else {"text": text},
        "prompt_only": {"prompt": prompt},
        "prompt_completion": {"prompt": prompt, "completion": good},
        "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
        "implicit_prompt_preference": {"chosen": prompt + good, "rejected": prompt + bad},
        "unpaired_preference": {"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)},
    }[form]


def load_dataset(name: str, config: str | None = None, *, split: str | None = None, streaming: bool = False):
    from datasets import Dataset, DatasetDict, IterableDatasetDict

    if name != f"{OWNER}/zen":
        raise ConnectionError(f"{name} is not made here")
    every = DatasetDict(
        {
            part: Dataset.from_list([_row(config, i) for i in rows])
            for part, rows in (("train", range(17)), ("test", range(17, 19)))
        }
    )
    if split is not None:
        part, _, some = split.partition("[")
        found = every[part].select(range(int(some.strip(":]")))) if some else every[part]
        return found.to_iterable_dataset() if streaming else found
    return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in every.items()}) if streaming else every
