"""Every form in which the Triton engine launches its kernels: a list of problems, and what is launched for them.

The engine runs on tensors without storage, and its launches are recorded. Triton itself then says what each launch
would be compiled for, so the forms are those of a real run: types, alignment, constants, warps and stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastdpo.costs.gpus import MULTIPROCESSORS
from fastdpo.head import LogitTransform, LoRA, Routing
from fastdpo.ops.problem import STATS, Gradients, Head, Needs, Rows, Upstream
from fastdpo.ops.triton import backward as triton_backward
from fastdpo.ops.triton import forward as triton_engine
from fastdpo.ops.triton import launch, special
from fastdpo.ops.triton.launch import Recorder, Target

ARCHITECTURES = (80, 90, 100, 120)  # whose tiles differ
# What launches ask for; earlier commits (tools.kernels --revision) left it to a default that was the same.
OPTIONS = getattr(launch, "OPTIONS", {"enable_fp_fusion": True})

TYPES = {  # (hidden, weight, multiplied in)
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "mixed": (torch.float32, torch.float32, torch.bfloat16),  # autocast over fp32 parameters
}


@dataclass(frozen=True)
class Problem:
    name: str
    tokens: int = 8192
    vocab_size: int = 128256
    hidden_size: int = 4096
    bias: bool = False
    rank: int = 0  # of a low-rank head
    softcap: float = 0.0
    stats: tuple[str, ...] = ()
    tau: tuple[float, float] | None = None  # routed
    entropy: bool = False  # has an upstream gradient
    labels: int = 0  # of a row, where it has several; then lse has one too
    frozen: bool = False  # no gradient of the head
    frozen_hidden: bool = False
    deterministic: bool = False
    shard: bool = False  # of the vocabulary
    forward_only: bool = False
    adds: bool = False  # the head's gradient to one that is there
    divergence: str = ""  # from a teacher's head, of this kind
    masked: bool = False  # without labels


TEACHER = 1024  # columns of hidden that a teacher has more
_OPTIONS = {"bias": True, "softcap": 30.0}
ONE_TAU, TWO_TAUS = (2.0**-10, 2.0**-10), (2.0**-9, 2.0**-11)  # one set of pairs, and two
PROBLEMS = [
    Problem("exact"),
    Problem("exact, options", rank=16, **_OPTIONS),
    Problem("entropy", stats=("entropy",), entropy=True, frozen=True),
    Problem("entropy, options", stats=STATS, entropy=True, rank=16, **_OPTIONS),
    Problem("routed", tau=TWO_TAUS),
    Problem("routed, few tokens", tokens=2048, tau=TWO_TAUS),
    Problem("routed, one tau", tokens=2048, tau=ONE_TAU),
    Problem("routed, frozen", tau=TWO_TAUS, frozen=True),
    Problem("routed, frozen hidden", tau=TWO_TAUS, frozen_hidden=True),
    Problem("routed, options", tokens=2048, tau=TWO_TAUS, rank=64, **_OPTIONS),
    Problem("routed, options, one tau", tokens=2048, tau=ONE_TAU, rank=16, **_OPTIONS),
    Problem("routed, larger tau for dweight", tokens=2048, tau=(1e-3, 1e-2), **_OPTIONS),
    Problem("routed, repeatable", tokens=2048, tau=TWO_TAUS, deterministic=True),
    Problem("gradients added", tokens=2048, tau=ONE_TAU, adds=True),
    Problem("forward", forward_only=True),
    Problem("statistics", stats=STATS, forward_only=True),
    Problem("several labels", labels=32),
    Problem("several labels, routed, options", tokens=2048, labels=32, tau=ONE_TAU, rank=16, **_OPTIONS),
    Problem("several labels, rows not aligned", hidden_size=4097, labels=32, tau=TWO_TAUS),
    Problem("short rows", hidden_size=896, tau=TWO_TAUS),
    Problem("rows not aligned", hidden_size=4097, tau=TWO_TAUS),
    Problem("rows not aligned, options", hidden_size=4097, stats=STATS, entropy=True, rank=16, **_OPTIONS),
    Problem("divergence, exact", divergence="forward_kl", stats=("logps",)),
    Problem("divergence, routed", divergence="forward_kl", stats=("logps",), tau=TWO_TAUS),
    Problem("divergence, mask", divergence="forward_kl", masked=True, tau=ONE_TAU, frozen=True),
    Problem("reverse divergence, routed", tokens=2048, divergence="reverse_kl", tau=ONE_TAU),
    Problem("jsd, routed", divergence="jsd", masked=True, tau=ONE_TAU),
    Problem("jsd, routed, options", tokens=2048, divergence="jsd", tau=TWO_TAUS, rank=16, **_OPTIONS),
    Problem("jsd, entropy, options", divergence="jsd", stats=("entropy",), entropy=True, rank=16, **_OPTIONS),
    Problem("divergence, entropy", divergence="forward_kl", stats=("entropy",), entropy=True, forward_only=True),
    Problem("divergence, rows not aligned", hidden_size=4097, divergence="reverse_kl", tau=TWO_TAUS, **_OPTIONS),
    Problem("shard of the vocabulary", vocab_size=32064, stats=STATS, tau=TWO_TAUS, shard=True),
]


@dataclass(frozen=True)
class Variant:
    """One kernel for one set of types and constants, as triton.compiler.ASTSource and compile() take them."""

    module: str
    kernel: str
    capability: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    warps: int
    stages: int
    problems: list[str] = field(default_factory=list, compare=False)  # that launch it

    @property
    def key(self) -> str:
        return repr(
            (self.module, self.kernel, self.signature, self.constants, self.attributes, self.warps, self.stages)
        )

    @property
    def name(self) -> str:
        return self.kernel.removesuffix("_kernel")

    def constant(self, name: str, otherwise=None):
        """Of an argument, or of a tuple's member."""
        for index, (argument, kind) in enumerate(self.signature.items()):
            members = getattr(kind, "_fields", ())
            if argument == name or name in members:
                path = (index,) if argument == name else (index, members.index(name))
                value = self.constants.get(path, otherwise)
                return getattr(value, "value", value)
        return otherwise

    @property
    def compute(self) -> str:
        """The type that a matrix product multiplies in."""
        return str(self.constant("COMPUTE", ""))

    @property
    def has_descriptors(self) -> bool:
        return any(str(kind).startswith("tensordesc") for kind in self.signature.values())

    @property
    def shape(self) -> str:
        """Tile, warps and stages."""
        sizes = [self.constant(name) for name in ("BM", "TILE", "BN", "BK")]
        return "x".join(str(size) for size in sizes if size) + f" w{self.warps} s{self.stages}"


class _NoDevice:
    """Triton's driver, as far as naming the form of a launch needs one. A device's number is its capability here."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class _OneShard:
    """Collectives of a group of one."""

    vocab_size, widest = 128256, 32064

    def label_logit(self, x: Tensor) -> Tensor:
        return x

    sum = max = logsumexp = sum_before = label_logit


def variant_of(capability: int, kernel, arguments: dict, warps: int, stages: int) -> Variant:
    """What Triton compiles for kernel[grid](**arguments)."""
    triton.runtime.driver.set_active(_NoDevice(capability))
    *_, backend, binder = kernel.device_caches[capability]
    keywords = {**arguments, "num_warps": warps, "num_stages": stages, "debug": False, **OPTIONS}
    bound, specialization, options = binder(**keywords)
    _, signature, constexprs, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return Variant(kernel.__module__, kernel.__name__, capability, signature, constexprs, attributes, warps, stages)


def record(problem: Problem, types: str, capability: int) -> list[tuple]:
    """The launches of a forward and a backward."""
    hidden_type, weight_type, compute = TYPES[types]
    n, v, h, r = problem.tokens, problem.vocab_size, problem.hidden_size, problem.rank

    def meta(*size: int, dtype: torch.dtype = weight_type) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    head = Head(
        hidden=meta(n, h, dtype=hidden_type),
        weight=meta(v, h),
        bias=meta(v) if problem.bias else None,
        lora=LoRA(meta(r, h), meta(v, r), 2.0) if r else None,
        transform=LogitTransform(softcap=problem.softcap),
        compute_dtype=compute,
    )
    rows = Rows(meta(n, dtype=torch.int64), -100, 251 * 128 if problem.shard else 0, 128256)
    engine, backward, heads = triton_engine.forward, triton_backward.backward, head
    if problem.divergence:
        from fastdpo.ops.divergence.problem import DivergenceUpstream, Heads
        from fastdpo.ops.triton.divergence.backward import backward
        from fastdpo.ops.triton.divergence.forward import forward as engine

        teacher = head.replace(hidden=meta(n, TEACHER + h, dtype=hidden_type), weight=meta(v, TEACHER + h), lora=None)
        logps = "logps" in problem.stats
        heads = Heads(head, teacher, problem.divergence, 0.5, not problem.masked, logps)
    if problem.labels:
        from fastdpo.ops import several
        from fastdpo.ops.problem import Engine

        by_row = Engine("triton", engine, backward)
        engine, backward = partial(several.forward, by_row), partial(several.backward, by_row)
        rows = rows.replace(labels=meta(n, problem.labels, dtype=torch.int64))
    routing = None if problem.tau is None else Routing.of(*problem.tau, meta(dtype=torch.int64))
    shards = _OneShard() if problem.shard else None
    trained = not problem.frozen
    needs = Needs(not problem.frozen_hidden, trained, trained and problem.bias, trained and r > 0, trained and r > 0)
    with (
        Recorder(Target(capability, MULTIPROCESSORS[capability].count)) as launches,
        deterministic(problem.deterministic),
    ):
        saved = engine(heads, rows, stats=frozenset(problem.stats), routing=routing, shards=shards)
        if not problem.forward_only:
            column = meta(n, dtype=torch.float32)
            upstream = Upstream(column, column if problem.entropy else None)
            if problem.divergence:
                upstream = DivergenceUpstream(column, upstream.coef, upstream.coef_entropy)
            if problem.labels:
                upstream = Upstream(meta(n, problem.labels, dtype=torch.float32), coef_lse=column)
            routing = None if problem.entropy else routing
            sums = Gradients()
            if problem.adds:
                sums.weight = meta(v, h, dtype=torch.float32)
            if problem.shard:  # what ranks add up
                sums.hidden = meta(n, h, dtype=torch.float32)
            added = {"sums": sums} if problem.adds or problem.shard else {}  # earlier commits do not know it
            backward(heads, rows, saved, upstream, routing, needs, **added)
    return launches


@contextlib.contextmanager
def deterministic(wanted: bool):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def special_forms(capability: int) -> list[str]:
    kernel = special.KERNELS.get(capability)
    return list(special.load(kernel).FORMS) if kernel else []


# By type, the problems whose forms no other type's forms stand for; bf16's are used where few must do. Of these, only
# kernels with a product are compiled: the others' code is hardly the type's. A routed call's exact kernel is that of an
# exact call, but for a flag that it reads at its start.
ESSENTIAL = {
    "bf16": {
        *("exact", "exact, options", "routed", "routed, options", "routed, options, one tau"),
        *("forward", "statistics", "entropy", "short rows"),
        *("divergence, exact", "divergence, routed", "jsd, routed, options", "jsd, entropy, options"),
    },
    "fp16": {"exact", "routed, options", "forward", "jsd, routed, options"},
    "fp32": {"exact, options", "routed", "statistics", "divergence, routed", "jsd, entropy, options"},
    "mixed": {"exact, options", "routed", "jsd, routed, options"},
}


def variants(
    capability: int,
    types: list[str],
    kernel: str | None = None,
    *,
    essential: Collection[str] = ("fp16", "fp32", "mixed"),
) -> list[Variant]:
    """Each once, in the order in which they are first launched; `kernel` is part of a name, `essential` the types whose
    essential problems are enough."""
    found: dict[str, Variant] = {}
    for name in types:
        for problem in PROBLEMS:
            if name in essential and problem.name not in ESSENTIAL[name]:
                continue
            if problem.divergence and find_spec("fastdpo.ops.triton.divergence") is None:  # an earlier commit
                continue
            launched = set()
            launches = []
            for form in (None, *special_forms(capability)) if problem.forward_only else (None,):
                with special.forced(form):
                    launches += record(problem, name, capability)
            for function, _, arguments, warps, stages in launches:
                if kernel is not None and kernel not in function.__name__:
                    continue
                variant = variant_of(capability, function, arguments, warps, stages)
                if name in essential and not variant.compute:
                    continue
                launched.add(variant.key)
                found.setdefault(variant.key, variant)
            for key in launched:
                found[key] = replace(found[key], problems=[*found[key].problems, f"{name}: {problem.name}"])
    return list(found.values())
