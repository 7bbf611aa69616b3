"""Every launch of real models' training steps, found without a GPU and compiled for cards it may meet.

python -m tools.launches [--model NAME ...] [--arch 86 ...] [--dtype bf16 ...] [--run NAME ...]
                         [--handful] [--record] [--json FILE]

Public calls run on tensors without storage (fake_gpu.py) at the models' own sizes, in several batches each. Of every
launch the grid, the conditions of TMA and the number of forms of one model are checked; every form is compiled, and its
machine code held against its card's shared memory, against spills and against offsets of 32 bits where a tensor needs
64. --record stops before the compiler. Exit status 1 on a fault.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from rich.console import Console
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import fastdpo
from fastdpo.costs.gpus import MULTIPROCESSORS
from fastdpo.ops.problem import STATS
from tools.fake_gpu import FakeGpu
from tools.kernel_code import Code
from tools.kernel_variants import TYPES, Variant, deterministic, variant_of
from tools.kernels import TOGETHER, examine, table_of
from tools.offsets import LIMIT

MOST_FORMS = 20  # of one model's training: each is compiled once, at its first step
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # of a grid's dimensions
MOST_BOX = 256  # elements of a box along one dimension, as TMA copies it


@dataclass(frozen=True)
class Model:
    vocab_size: int
    hidden_size: int
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: bool = False


MODELS = {
    "SmolLM2-135M": Model(49152, 576),
    "GPT-2": Model(50257, 768),
    "Qwen2.5-0.5B": Model(151936, 896),
    "Gemma 3 1B": Model(262144, 1152),
    "TinyLlama 1.1B": Model(32000, 2048),
    "Llama 3.2 1B": Model(128256, 2048),
    "Gemma 2 2B": Model(256000, 2304, softcap=30.0),
    "Phi-2": Model(51200, 2560, bias=True),
    "Phi-3 mini": Model(32064, 3072),
    "Granite 3.0 8B": Model(49155, 4096, logit_scale=1 / 16),
    "Llama 3.1 8B": Model(128256, 4096),
    "Falcon 7B": Model(65024, 4544),
    "Qwen2.5-14B": Model(152064, 5120),
    "DeepSeek-V3": Model(129280, 7168),
    "Llama 3.1 70B": Model(128256, 8192),
    "Command R": Model(256000, 8192, logit_scale=0.0625),
    "Command R+": Model(256000, 12288, logit_scale=0.0625),  # more than 2^31 weights
    "odd rows": Model(50257, 4097),  # no model's: what TMA cannot address
}
HANDFUL = ("Qwen2.5-0.5B", "Gemma 2 2B", "Llama 3.1 8B", "Granite 3.0 8B")
BATCHES = ((4, 512), (16, 512), (6, 1111), (64, 1024))  # sequences, tokens of each
LONG = (8, 65536)  # for the first run in the first type only


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    options: dict
    like_head: Callable[..., Tensor]  # an empty tensor of this size, of the head's type


def _dpo(x: Inputs, **options) -> None:
    options |= x.options
    if "bias" in options:
        options["ref_bias"] = options["bias"].detach()
    ref = torch.empty_like(x.hidden).detach()
    fastdpo.linear_dpo_loss(x.hidden, x.weight, x.labels, ref_hidden=ref, ref_weight=x.weight.detach(), **options)


def _low_rank(rank: int) -> Callable[[Inputs], None]:
    def run(x: Inputs) -> None:
        weight = x.weight.detach()
        a, b = (x.like_head(*size).requires_grad_() for size in ((rank, weight.shape[1]), (weight.shape[0], rank)))
        fastdpo.linear_logps(x.hidden, weight, x.labels, lora=(a, b, 2.0), **x.options)

    return run


def _repeatable(x: Inputs) -> None:
    with deterministic(True):
        _dpo(x)


RUNS: dict[str, Callable[[Inputs], None]] = {
    "trained head": _dpo,
    "frozen head": lambda x: _dpo(x._replace(weight=x.weight.detach())),
    "forward": lambda x: fastdpo.linear_logps(x.hidden.detach(), x.weight.detach(), x.labels, **x.options),
    "exact": lambda x: _dpo(x, backward="exact"),
    "low rank 16": _low_rank(16),
    "low rank 64": _low_rank(64),
    "statistics": lambda x: fastdpo.linear_token_stats(x.hidden, x.weight, x.labels, stats=STATS, **x.options),
    "repeatable": _repeatable,
}


class Launch(NamedTuple):
    variant: Variant
    grid: tuple[int, ...]
    large: tuple[str, ...]  # arguments of more than 2^31 elements
    found: tuple[str, ...]  # faults of the launch itself


def launches(model: Model, types: str, run: str, capability: int, batches=BATCHES) -> Iterator[Launch]:
    """Of a training step in each of the batches; equal ones once."""
    hidden_type, weight_type, compute = TYPES[types]
    seen = set()
    for sequences, tokens in batches:
        with FakeGpu(capability) as gpu, torch.autocast("cuda", compute, enabled=hidden_type != compute):
            like_head = functools.partial(gpu.empty, dtype=weight_type)
            hidden = gpu.empty(sequences, tokens + 1, model.hidden_size, dtype=hidden_type).requires_grad_()
            weight = like_head(model.vocab_size, model.hidden_size).requires_grad_()
            labels = gpu.empty(sequences, tokens, dtype=torch.int64)
            options = {"softcap": model.softcap, "logit_scale": model.logit_scale}
            if model.bias:
                options["bias"] = like_head(model.vocab_size).requires_grad_()
            # a causal model's: the last token predicts nothing
            RUNS[run](Inputs(hidden[:, :-1].detach().requires_grad_(), weight, labels, options, like_head))
            for kernel, grid, arguments, warps, stages in gpu.launches:
                variant = variant_of(capability, kernel, arguments, warps, stages)
                large = tuple(name for name, x in _tensors(arguments) if _reach(x) > LIMIT)
                known = variant.key, grid, large
                if known not in seen:
                    seen.add(known)
                    yield Launch(variant, grid, large, tuple(faults_of(grid, arguments)))


def _tensors(arguments: dict) -> Iterator[tuple[str, Tensor]]:
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            yield name, x
        elif hasattr(x, "_fields"):
            yield from ((f"{name}.{field}", one) for field, one in x._asdict().items() if isinstance(one, Tensor))


def _reach(x: Tensor) -> int:
    """Elements from its first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0


def faults_of(grid: tuple[int, ...], arguments: dict) -> Iterator[str]:
    """What a driver would refuse, in words."""
    for programs, most in zip(grid, MOST_PROGRAMS):
        if programs > most:
            yield f"{programs} programs along a dimension of the grid; there are {most} at most"
    for name, x in arguments.items():
        if not isinstance(x, TensorDescriptor):
            continue
        item = x.base.element_size()
        if x.base.data_ptr() % 16 or any(stride * item % 16 for stride in x.strides[:-1]) or x.strides[-1] != 1:
            yield f"{name}: TMA needs an address and strides of whole 16 bytes; got strides {x.strides}"
        if max(x.block_shape) > MOST_BOX or x.block_shape[-1] * item % 16:
            yield f"{name}: a box of {x.block_shape} elements of {item} bytes"
        if max(x.shape) > 1 << 32 or max(stride * item for stride in x.strides) >= 1 << 40:
            yield f"{name}: a tensor of {x.shape} with strides {x.strides}"


@dataclass(frozen=True)
class Form:
    """A kernel's form and all that launches it."""

    variant: Variant
    large: frozenset[str]
    found: tuple[str, ...]


def record(types: list[str], runs: list[str], capability: int, name: str) -> tuple[list[Form], list[str], dict]:
    """(forms, faults that are no form's, how many forms each training of the model has)."""
    forms: list[Form] = []
    problems, counts = [], {}
    for kind in types:
        for run in runs:
            batches = (*BATCHES, LONG) if (kind, run) == (types[0], runs[0]) else BATCHES
            where = f"{kind}: {name}, {run}"
            found = list(launches(MODELS[name], kind, run, capability, batches))
            forms += [Form(replace(x.variant, problems=[where]), frozenset(x.large), x.found) for x in found]
            count = counts[name, kind, run] = len({x.variant.key for x in found})
            if count > MOST_FORMS:
                problems.append(f"sm_{capability} {where}: {count} forms; {MOST_FORMS} at most")
    return _merged(forms), problems, counts


def check(forms: list[Form]) -> list[tuple[Form, Code | None, list[str]]]:
    results = []
    for form, (_, code, found) in zip(forms, examine([form.variant for form in forms])):
        found = [*form.found, *found]
        short = form.large & set(code.narrow) if code is not None else set()
        if short:
            found.append(f"offsets of 32 bits into {', '.join(sorted(short))}, which has more than 2^31 elements")
        results.append((form, code, found))
    return results


def _chosen(parser: argparse.ArgumentParser, option: str, wanted: list[str] | None, known) -> list[str]:
    unknown = set(wanted or ()) - set(known)
    if unknown:
        parser.error(f"{option} must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return list(wanted or known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", nargs="+", help=f"of {', '.join(MODELS)}; all by default")
    which.add_argument("--handful", action="store_true", help=f"only {', '.join(HANDFUL)}, as `make kernels` does")
    parser.add_argument("--arch", type=int, nargs="+", choices=MULTIPROCESSORS, default=list(MULTIPROCESSORS))
    parser.add_argument("--dtype", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--run", nargs="+", help=f"of {', '.join(RUNS)}; all by default")
    parser.add_argument("--record", action="store_true", help="compile nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; 1: this one")
    parser.add_argument("--json", type=Path, help="write every form's figures to this file")
    args = parser.parse_args()
    names = list(HANDFUL) if args.handful else _chosen(parser, "--model", args.model, MODELS)
    runs = _chosen(parser, "--run", args.run, RUNS)
    console, failed, figures = Console(width=150), 0, []
    with multiprocessing.get_context("spawn").Pool(args.jobs) if args.jobs > 1 else nullcontext() as pool:
        each = pool.imap if pool else map
        for capability in args.arch:
            started = time.monotonic()
            recorded = list(each(functools.partial(record, args.dtype, runs, capability), names))
            forms = _merged(form for found, _, _ in recorded for form in found)
            problems = [problem for _, found, _ in recorded for problem in found]
            counts = {name: n for _, _, found in recorded for name, n in found.items()}
            results = [(form, None, list(form.found)) for form in forms]
            if not args.record:
                parts = [forms[first : first + TOGETHER] for first in range(0, len(forms), TOGETHER)]
                results = [result for part in each(check, parts) for result in part]
                console.print(table_of(capability, [(form.variant, code, found) for form, code, found in results]))
            for form, _, found in results:
                if found:
                    v = form.variant
                    problems.append(f"sm_{capability} {v.name} {v.compute} {v.shape}: {'; '.join(found)} (launched for "
                                    f"{v.problems[0]})")  # fmt: skip
            for problem in problems:
                console.print(f"FAULT {problem}", markup=False)
            most = max(counts, key=counts.get)
            console.print(
                f"sm_{capability}, Triton {triton.__version__}: {len(counts)} trainings, at most {counts[most]} forms "
                f"of one ({', '.join(most)}); {len(results)} forms in all, {len(problems)} faults, "
                f"{time.monotonic() - started:.0f} s\n", markup=False)  # fmt: skip
            failed += len(problems)
            figures += [
                {"capability": capability, "kernel": form.variant.name, "type": form.variant.compute,
                 "tile": form.variant.shape, "launched for": form.variant.problems, "faults": found,
                 **({} if code is None else asdict(code))} for form, code, found in results
            ]  # fmt: skip
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if failed else 0


def _merged(forms: Iterable[Form]) -> list[Form]:
    """Each once, the costly ones first."""
    found: dict[str, Form] = {}
    for form in forms:
        known = found.setdefault(form.variant.key, Form(replace(form.variant, problems=[]), frozenset(), ()))
        known.variant.problems.extend(form.variant.problems)
        both = tuple({*known.found, *form.found})
        found[form.variant.key] = Form(known.variant, known.large | form.large, both)
    return sorted(found.values(), key=lambda form: form.variant.name != "exact")


if __name__ == "__main__":
    sys.exit(main())
