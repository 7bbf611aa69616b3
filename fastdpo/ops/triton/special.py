"""Which fold serves a call: the plain one, unless a special one was measured to be faster where it is to run.

The table of measurements is special.json, which benchmarks.gpu.forwards writes; what was never measured is off. A
special kernel's first call in a process is compared with the plain one, and a kernel that differs is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TABLE = Path(__file__).with_suffix(".json")
KERNELS = {90: "hopper"}  # by compute capability: a module with `serves`, `fold` and the FORMS that this takes
TOLERANCE = 1e-3  # of a logit; a column too many in its block is 8 times as much


@dataclass(frozen=True)
class Measured:
    """Both kernels' times on one machine, for one H and type; the special one's in its fastest form."""

    kernel: str
    form: str
    capability: int
    hidden_size: int
    dtype: str
    triton: str
    special_ms: float
    plain_ms: float
    device: str
    date: str

    @property
    def is_faster(self) -> bool:
        return self.special_ms < self.plain_ms


@functools.cache
def table() -> tuple[Measured, ...]:
    return tuple(Measured(**one) for one in json.loads(TABLE.read_text()))


def fastest(kernel: str, capability: int, hidden_size: int, dtype: str, triton: str) -> str | None:
    """The form in which it was measured to be faster with this H; between two measured ones, with both."""
    of_call = (kernel, capability, dtype, release(triton))
    known = [x for x in table() if (x.kernel, x.capability, x.dtype, release(x.triton)) == of_call]
    below = max((x for x in known if x.hidden_size <= hidden_size), key=lambda x: x.hidden_size, default=None)
    above = min((x for x in known if x.hidden_size >= hidden_size), key=lambda x: x.hidden_size, default=None)
    return above.form if below and above and below.is_faster and above.is_faster else None


def release(version: str) -> tuple[int, ...]:
    """(3, 9) of "3.9.1+git": what makes other code of the same kernel."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


# Of this process
_forced: list[str | None] = []
_compared: set[tuple] = set()
_dropped: dict[str, str] = {}  # kernel: why


@contextlib.contextmanager
def forced(form: str | None) -> Iterator[None]:
    """Inside, the special kernel serves all that it can in this form, measured or not, uncompared; None: nothing."""
    before = list(_forced)
    try:
        _forced.append(form)
        yield
    finally:
        _forced[:] = before


def fold_of(call, low_rank, sums, plain: Callable) -> Callable:
    """`plain`, or another with its arguments."""
    kernel = KERNELS.get(call.target.capability)
    if kernel is None or kernel in _dropped:
        return plain
    import triton

    dtype = str(call.dtype).removeprefix("torch.")
    form = fastest(kernel, call.target.capability, call.hidden_size, dtype, triton.__version__)
    form = _forced[-1] if _forced else form
    if form is None:
        return plain
    try:
        special = load(kernel)
        if not special.serves(call, low_rank, sums):
            return plain
        fold = functools.partial(special.fold, form=form)
        if _forced or _is_recording():
            return fold
        known = kernel, form, call.device, dtype, call.hidden_size
        if known not in _compared:
            if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return plain  # nothing can be compared inside of a CUDA graph
            found = difference(call, fold, plain)
            if not found <= TOLERANCE:
                return _drop(kernel, f"differs from the plain kernel by {found:.3g} on a small problem", plain)
            _compared.add(known)
        return fold
    except Exception as error:  # the compiler's own, of many types: whatever it is, the plain kernel can do without
        return _drop(kernel, f"fails: {type(error).__name__}: {str(error).strip()[-300:]}", plain)


def load(kernel: str):
    """The module; only here, since Triton's experimental parts change from release to release."""
    return importlib.import_module(f".{kernel}", __package__)


def _is_recording() -> bool:
    from .launch import Recorder

    return Recorder.active is not None


def _drop(kernel: str, why: str, plain: Callable) -> Callable:
    _dropped[kernel] = why
    warnings.warn(
        f"fastdpo's special forward kernel {kernel!r} {why}. This process goes on with the plain kernel, whose results"
        " are not in doubt. Please report this with what `python -m fastdpo doctor` prints.",
        stacklevel=2,
    )
    return plain


def difference(call, special: Callable, plain: Callable) -> float:
    """The largest one between both kernels' results, of a small problem with the call's type and H: tiles with labels
    and without, the vocabulary's edge, several tiles to a program, tokens that do not exist. Waits for the device."""
    from ...head import LogitTransform
    from ..problem import Head, Rows
    from .call import Call
    from .common import LowRank, TokenList, TokenRange
    from .stats import BlockSums

    tokens, columns, size, device = 300, 2000, call.hidden_size, call.device
    chance = torch.Generator().manual_seed(0)

    def numbers(rows: int, scale: float) -> torch.Tensor:
        x = torch.randn(rows, size, generator=chance, device="cpu", dtype=torch.float32)
        return x.mul(scale).to(device, call.dtype)

    hidden, weight = numbers(tokens, 1.0), numbers(columns, 2 * size**-0.5)
    labels = torch.randint(columns, (tokens,), generator=chance, device="cpu", dtype=torch.int32).to(device)
    existing, rows = tokens - 5, torch.arange(tokens, dtype=torch.int32, device=device)
    # whole, as a call's: the code that is compared is the one that will serve
    count = torch.tensor([existing], dtype=torch.int32, device=device)
    listed = TokenList(rows, labels, rows, count, rows.long(), call.unit)
    results = []
    for fold in (special, plain):
        small = Call(
            Head(hidden, weight, transform=LogitTransform(), compute_dtype=call.dtype), Rows(labels, -100, 0, columns)
        )
        small.target = replace(call.target, programs=2)
        lse = torch.full((tokens, small.num_blocks), torch.nan, dtype=torch.float32, device=device)
        label_logit = torch.full((tokens,), torch.nan, dtype=torch.float32, device=device)
        fold(small, TokenRange(listed, 0, tokens), hidden, LowRank(), label_logit, BlockSums(lse, *[None] * 5))
        results.append(torch.cat((lse, label_logit[:, None]), 1)[:existing])
    ours, theirs = results
    return (ours - theirs).abs().amax().item()  # NaN where one is


def report(triton: str | None) -> dict[str, str]:
    """What serves and why, by kernel, architecture, type and H."""
    found = {"all others" if table() else "all": "plain: no special kernel was measured to be faster"}
    for x in table():
        why = f"{x.special_ms / x.plain_ms:.3f} of the plain kernel's time in the form {x.form} on {x.device}, {x.date}"
        if x.kernel in _dropped:
            state = f"plain: {x.kernel} {_dropped[x.kernel]}"
        elif triton is None or release(x.triton) != release(triton):
            state = f"plain: {x.kernel} was measured with Triton {x.triton}, this is {triton}"
        elif not x.is_faster:
            state = f"plain: {x.kernel} took {why}"
        else:
            state = f"{x.kernel}: {why}"
            if any((kernel, *rest) == (x.kernel, x.dtype, x.hidden_size) for kernel, _, _, *rest in _compared):
                state += "; compared with the plain one here"
        found[f"sm_{x.capability} {x.dtype} H {x.hidden_size}"] = state
    return found
