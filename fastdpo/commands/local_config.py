"""The head's sizes from a model's config.json, whatever a family calls them. Local files only; nothing is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VOCAB = ("vocab_size", "padded_vocab_size", "n_vocab", "vocabulary_size")
# of what the head multiplies: OPT's is projected, and others call it by older names
HIDDEN = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "model_dim", "dim", "emb_dim", "embed_dim")
DTYPE = ("dtype", "torch_dtype")
# Where models of several parts keep their language model
INSIDE = (
    "text_config",
    "llm_config",
    "language_config",
    "text_model_config",
    "thinker_config",
    "decoder",
    "decoder_config",
)
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class HeadSizes:
    vocab: int
    hidden: int
    dtype: str | None  # None: the config does not say
    tied: bool | None  # the head is the embedding; None: the config does not say
    family: str
    notes: tuple[str, ...] = ()


def _parts(config: dict) -> list[dict]:
    """The language model's part first, then what is around it."""
    for name in INSIDE:
        if isinstance(config.get(name), dict):
            return [*_parts(config[name]), config]
    return [config]


def _first(parts: list[dict], names: tuple[str, ...]):
    return next((part[name] for part in parts for name in names if part.get(name) is not None), None)


def _size(parts: list[dict], names: tuple[str, ...], file: Path) -> int:
    value = _first(parts, names)
    if value is None:
        where = " or its ".join(("it", *(name for name in INSIDE if name in parts[-1])))
        what = "vocab_size" if names is VOCAB else "hidden_size"
        raise ValueError(f"{file} has no {what} ({', '.join(names)} are looked for in {where})")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {next(x for x in names if _first(parts, (x,)) == value)} is {value!r}, no size")
    return value


def head_sizes(path: str | Path) -> HeadSizes:
    """Of a model's folder, or of its config.json.

    Raises:
        ValueError: naming the file or the entry that is missing, or that has no meaning.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file():
        hint = "" if Path(path).expanduser().exists() else "; only local files are read, no hub"
        raise ValueError(f"--model {path}: there is no {file}{hint}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold one JSON object; it holds a {type(config).__name__}")
    parts = _parts(config)
    dtype = _first(parts, DTYPE)
    dtype = str(dtype).removeprefix("torch.") if dtype is not None else None
    tied = _first(list(reversed(parts)), ("tie_word_embeddings",))  # the outer one ties, where it says so
    notes = []
    if dtype is not None and dtype not in DTYPES:
        notes.append(f"the config's dtype {dtype} is none that a head is trained in: taken as bfloat16")
        dtype = None
    if config.get("quantization_config"):
        notes.append("the model is quantised; its head is counted as it is not, and fastdpo refuses quantised heads")
    if config.get("is_encoder_decoder"):
        notes.append("the model has an encoder: only the decoder's head is counted")
    architectures = config.get("architectures") or [config.get("model_type") or "a model"]
    return HeadSizes(
        _size(parts, VOCAB, file), _size(parts, HIDDEN, file), dtype,
        tied if isinstance(tied, bool) else None, str(architectures[0]), tuple(notes),
    )  # fmt: skip
