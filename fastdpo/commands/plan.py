"""Peak memory and expected time of the head and the loss of one training step, and the longest context that fits.

Everything here is MODELLED: memory by counting what lives at once, held within some per cent of measurements on a CPU;
times by counting products, bytes and launches at rates that others have published. No time of fastdpo on a GPU has been
measured. Counted are hidden states, head, both gradients, the reference's head and hidden states, and what the step
needs beside them: not the model's other layers, their activations, the optimizer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..costs import memory, times
from ..costs.gpus import GPUS, Gpu, named
from ..costs.memory import GIB, PATHS, Batch
from .local_config import DTYPES, HeadSizes, head_sizes
from .table import aligned

NAMES = {
    "eager": "eager logits",
    "trl": "TRL's chunked function",
    "liger": "Liger's fused DPO loss",
    "fastdpo exact": "fastdpo, exact",
    "fastdpo routed": "fastdpo, routed",
}


@dataclass(frozen=True)
class Row:
    path: str
    peak: float  # bytes
    growth: float  # of it what comes on top of what is there before the step
    seconds: float | None
    longest: int | None  # completion tokens


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="a Hugging Face model's folder, or its config.json")
    parser.add_argument("--vocab", type=int, metavar="V", help="rows of the head, instead of --model")
    parser.add_argument("--hidden-size", type=int, metavar="H")
    parser.add_argument("--dtype", choices=DTYPES, help="of hidden states and head; default: the model's, or bfloat16")
    parser.add_argument("--tokens", type=int, metavar="N", required=True, help="completion tokens of one micro-batch")
    parser.add_argument("--pairs", type=int, default=1, help="preference pairs that share the tokens (1)")
    parser.add_argument("--prompt-share", type=float, default=0.0, help="of all tokens, those of prompts (0)")
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient, as under most LoRA")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="no reference model is there")
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or none for a CPU; default: the one here")
    parser.add_argument("--memory", type=float, metavar="GiB", help="what the head and the loss may take; default: all")


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive; got {value!r}")


def sizes(args: argparse.Namespace) -> HeadSizes:
    for name in ("vocab", "hidden_size", "tokens", "pairs", "memory"):
        _positive(f"--{name.replace('_', '-')}", getattr(args, name))
    if not 0 <= args.prompt_share < 1:
        raise ValueError(f"--prompt-share must lie in [0, 1); got {args.prompt_share!r}")
    if args.model is not None:
        if args.vocab is not None or args.hidden_size is not None:
            raise ValueError("--model says V and H: leave out --vocab and --hidden-size")
        return head_sizes(args.model)
    if args.vocab is None or args.hidden_size is None:
        missing = " and ".join(
            x for x in ("--vocab", "--hidden-size") if getattr(args, x[2:].replace("-", "_")) is None
        )
        raise ValueError(f"{missing} missing: give --model, or --vocab and --hidden-size")
    return HeadSizes(args.vocab, args.hidden_size, None, None, "")


def chosen_gpu(name: str | None) -> tuple[str | None, float | None, str]:
    """(its key in GPUS, None on a CPU; its memory in GiB; how it came to be)."""
    if name is not None and name.lower() == "none":
        return None, None, ""
    if name is not None:
        key = named(name)
        return key, GPUS[key].memory, ""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        try:
            return named(properties.name), properties.total_memory / GIB, f"found here: {properties.name}"
        except ValueError as error:
            raise ValueError(f"{error}; --gpu NAME chooses one of these, --gpu none leaves out times") from None
    return "H100", GPUS["H100"].memory, "there is none here; --gpu chooses another"


def rows(batch: Batch, gpu: Gpu | None, capacity: float | None, dtype: str) -> tuple[list[Row], list[str]]:
    """One per path, and what to say about those without a time."""
    found, why = [], []
    for path in PATHS:
        seconds = None
        if gpu is not None and dtype != "float32":
            try:
                seconds = times.expected(path, batch, gpu, getattr(torch, dtype))
            except ImportError as error:
                why = [str(error)]
        longest = None if capacity is None else memory.longest(path, batch, capacity * GIB)
        found.append(Row(path, memory.peak(path, batch), PATHS[path].growth(batch), seconds, longest))
    if gpu is not None and dtype == "float32":
        why = ["no times in float32: the rates that are known are those of bf16 products, for --dtype bfloat16"]
    return found, why


def _errors(on_gpu: bool, timed: bool, dtype: str) -> Iterator[str]:
    """How far the figures are from what was measured, by anybody."""
    worst = "; ".join(f"{NAMES[name]} {path.error:.0%}" for name, path in PATHS.items())
    yield "memory    off by at most so much of the peaks measured on a CPU, in float32 and bfloat16:"
    yield f"          {worst}."
    if on_gpu:
        yield "          On a GPU it was not measured; fastdpo is counted at its bound, 128 MiB and 256 bytes a token."
    elif dtype == "float16":
        yield f"          In {dtype} it was not measured."
    if not timed:
        return
    for path in ("eager", "trl", "liger"):
        published = times.against_published(path) or ["nothing is published to hold it against"]
        yield f"time      {NAMES[path]}: a floor, {published[0]}"
        yield from (f"          {'':{len(NAMES[path])}}           {more}" for more in published[1:])
    yield "          fastdpo: expected, and never measured on a GPU; live pairs are those of a small trained model"
    yield "          (`python -m fastdpo picture` says what yours are). The model is docs/costs.md."


def run(args: argparse.Namespace) -> int:
    size = sizes(args)
    dtype = args.dtype or size.dtype or "bfloat16"
    key, card_memory, why_gpu = chosen_gpu(args.gpu)
    gpu = None if key is None else GPUS[key]
    capacity = args.memory if args.memory is not None else card_memory
    all_rows = round(args.tokens / (1 - args.prompt_share)) if args.prompt_share else None
    batch = Batch(
        args.tokens,
        size.vocab,
        size.hidden,
        DTYPES[dtype],
        all_rows,
        args.pairs,
        args.frozen,
        args.reference,
        bool(key),
    )
    found, notes = rows(batch, gpu, capacity, dtype)

    family = f"{size.family}: " if size.family else ""
    tied = {True: ", tied to the embedding", False: "", None: ""}[size.tied]
    print(f"{family}V = {size.vocab}, H = {size.hidden}, {dtype}, head {'frozen' if args.frozen else 'trained'}{tied}")
    prompts = f" and {all_rows - args.tokens} of prompts" if all_rows else ""
    pairs = f"{args.pairs} preference pair" + ("s" if args.pairs > 1 else "")
    print(f"{args.tokens} completion tokens{prompts}, {pairs}, {'with' if args.reference else 'without'} a reference")
    where = f"for an {key}, " if key else "for a CPU, "
    print(f"MODELLED {where}not measured{f' ({why_gpu})' if why_gpu else ''}\n")

    header = ["", "peak GiB", "on top of inputs"]
    header += ["time ms", "over two products"] if any(row.seconds for row in found) else []
    header += [f"tokens in {capacity:g} GiB", "a sequence"] if capacity is not None else []
    cells = []
    for row in found:
        line = [NAMES[row.path], f"{row.peak / GIB:.2f}", f"{row.growth / GIB:.2f}"]
        if len(header) > 3 and header[3] == "time ms":
            products = times.two_products(batch, gpu)
            least = "" if row.path.startswith("fastdpo") else ">= "
            known = row.seconds is not None
            line += [f"{least}{row.seconds * 1e3:.2f}", f"{row.seconds / products:.2f}"] if known else ["-", "-"]
        if capacity is not None:
            sequence = round(row.longest / (1 - args.prompt_share) / (2 * args.pairs))
            line += [f"{row.longest:,}", f"{sequence:,}"] if row.longest else ["none", "none"]
        cells.append(line)
    print("\n".join(aligned([header, *cells])))
    print()
    if capacity is not None:
        print("fits      completion tokens of a micro-batch, and of them and their prompts a sequence's part.")
        if args.memory is None:
            print(f"          All of the {key} is counted: --memory says what the model's other parts leave of it.")
    for note in (*size.notes, *notes):
        print(f"note      {note}")
    print("\n".join(_errors(key is not None, any(row.seconds for row in found), dtype)))
    return 0
