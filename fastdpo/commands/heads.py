"""A head to look at: from a safetensors file, or hidden states that a local model computes of a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..head import LogitTransform
from ..validation import FLOATS

_PLAIN = LogitTransform()
IGNORED = -100
TEXTS = ("text", "content", "messages", "completion", "response")  # keys of a row that has no pair


@dataclass(frozen=True)
class Head:
    name: str
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N] int64, none of them ignored
    bias: Tensor | None = None
    transform: LogitTransform = _PLAIN

    def some(self, count: int) -> Head:
        """At most `count` of its tokens, spread evenly."""
        rows = torch.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).long()
        return Head(self.name, self.hidden[rows], self.weight, self.labels[rows], self.bias, self.transform)


def from_file(path: str) -> Head:
    """Of a safetensors file with hidden [N, H], weight [V, H], labels [N], and bias [V] if there is one.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: naming what the file lacks, or what does not fit.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("--head reads a safetensors file: pip install safetensors") from error
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--head {path}: there is no such file")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"--head {path} is no safetensors file: {error}") from None
    missing = [name for name in ("hidden", "weight", "labels") if name not in tensors]
    if missing:
        found = ", ".join(tensors) or "nothing"
        raise ValueError(f"--head {path} has no {' and no '.join(missing)}: it has {found}")
    return checked(file.name, tensors["hidden"], tensors["weight"], tensors["labels"], tensors.get("bias"))


def checked(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **more) -> Head:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{name} must hold hidden [N, H], weight [V, H] and labels [N]; got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [V]; got {tuple(bias.shape)} beside {shapes}")
    for what, x in {"hidden": hidden, "weight": weight}.items():
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: {what} must be fp32, bf16, fp16 or fp64; got {x.dtype}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: labels must be integers; got {labels.dtype}")
    labels = labels.long()
    scored = labels != IGNORED
    hidden, labels = hidden[scored], labels[scored]
    if len(labels) < 2:
        raise ValueError(f"{name} must have at least 2 labels that are not {IGNORED}; got {len(labels)}")
    if labels.min() < 0 or labels.max() >= len(weight):
        raise ValueError(f"{name}: labels must lie in [0, {len(weight)}); got {labels.min()} to {labels.max()}")
    return Head(name, hidden.detach(), weight.detach(), labels, None if bias is None else bias.detach(), **more)


def _as_text(value, tokenizer) -> str:
    """A string, or a conversation in the tokenizer's template."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(x, dict) and "content" in x for x in value):
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.apply_chat_template(value, tokenize=False)
        return "\n".join(str(x["content"]) for x in value)
    raise ValueError(f"--data: a text must be a string or a list of messages; got {type(value).__name__}")


def texts_of(path: str, tokenizer) -> list[tuple[str, str]]:
    """(prompt, completion) of each row of a .jsonl file, or ("", paragraph) of a text file.

    A row is a preference pair (chosen and rejected count one each, after prompt if it has one), or has one of TEXTS.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--data {path}: there is no such file")
    content = file.read_text()
    if file.suffix != ".jsonl":
        return [("", part) for part in content.split("\n\n") if part.strip()]
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--data {path}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"--data {path}, line {number} must be an object; got {type(row).__name__}")
        prompt = _as_text(row.get("prompt", ""), tokenizer)
        sides = [row[name] for name in ("chosen", "rejected") if row.get(name)]
        sides = sides or [row[name] for name in TEXTS if row.get(name)][:1]
        if not sides:
            raise ValueError(
                f"--data {path}, line {number} has none of chosen, {', '.join(TEXTS)}: it has {', '.join(row)}"
            )
        found += [(prompt, _as_text(side, tokenizer)) for side in sides]
    return found


def _sequences(texts: list[tuple[str, str]], tokenizer, count: int, length: int) -> list[tuple[list[int], int]]:
    """(ids, how many are the prompt's), until `count` tokens of completions are there."""
    found, tokens = [], 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, completion in texts:
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        ids = (before + tokenizer(completion, add_special_tokens=False)["input_ids"] + end)[:length]
        if len(ids) < 2 or len(ids) <= len(before):
            continue
        found.append((ids, max(1, len(before))))
        tokens += len(ids) - max(1, len(before))
        if tokens >= count:
            break
    return found


@torch.no_grad()
def from_model(path: str, data: str, count: int, length: int, device: str, announce) -> Head:
    """Hidden states of `data` in a local Hugging Face model, scored where its completions are.

    Raises:
        ImportError: transformers is not installed.
        ValueError: naming what is missing, or why the model cannot be served.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("--model loads a Hugging Face model: pip install transformers") from error
    from ..models.huggingface import STATE, patch_model, unpatch_model

    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--model {path}: there is no such folder; only local files are read, no hub")
    announce("loading the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    sequences = _sequences(texts_of(data, tokenizer), tokenizer, count, length)
    if not sequences:
        raise ValueError(f"--data {data} has no text of two tokens or more")
    patch_model(model)  # which finds out what the model makes of its lm_head's output, or says why not
    transform = vars(model)[STATE].seen[1]
    unpatch_model(model)
    head, seen, hidden, labels = model.get_output_embeddings(), [], [], []
    hook = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        for number, (ids, prompt) in enumerate(sequences, 1):
            announce(f"hidden states, text {number} of {len(sequences)}")
            seen.clear()
            model(input_ids=torch.tensor([ids], device=device))
            hidden.append(seen[0][0, prompt - 1 : -1])
            labels.append(torch.tensor(ids[prompt:], device=device))
    finally:
        hook.remove()
    name = f"{folder.resolve().name} on {Path(data).name}"
    bias = getattr(head, "bias", None)
    return checked(name, torch.cat(hidden), head.weight, torch.cat(labels), bias, transform=transform)
