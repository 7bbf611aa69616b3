"""What the ranks of a group must agree on, exchanged once at the start of each call and of each backward.

A ticket is a fixed number of words: whatever ranks are given, exchanging them cannot fail for its size. It says which
call this is, the options, what the data looks like, how many columns a shard has, the draw of the routed backward's
key, and, from a rank that refuses its arguments, why. So every rank learns of a mismatch, or of a refusal, at the same
point, raises the same ValueError, and the group stays usable.

On the CPU tickets are compared on the host in every call. On a GPU that would wait for the device: there the host
compares only what it has not seen on this group before, and otherwise the device compares what changes from call to
call, turning results into NaN where ranks differ.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import sketch
from .shards import VocabShards

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs", "lse", "logps", "ref_logps")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
DIFFERENTIABLE = ("logps", "entropy", "lse", "divergence")
INPUTS = ("hidden", "weight", "bias", "lora A", "lora B")
TEACHER = ("ref_hidden", "ref_weight", "ref_bias")
MOST_KNOWN = 4096  # calls of a group that the host remembers


class _Field(NamedTuple):
    """How a value becomes a word, and a word what an error says."""

    word: Callable
    shown: Callable


def _real_word(value: float | None) -> int:
    return struct.unpack("<q", struct.pack("<d", math.nan if value is None else value))[0]


def _real(word: int) -> float | None:
    value = struct.unpack("<d", struct.pack("<q", word))[0]
    return None if math.isnan(value) else value


def _one_of(*values) -> _Field:
    return _Field(lambda value: values.index(value), lambda word: values[word])


def _names(known: tuple[str, ...]) -> _Field:
    return _Field(
        lambda names: sum(1 << known.index(name) for name in names),
        lambda word: [name for i, name in enumerate(known) if word >> i & 1],
    )


_INT, _REAL = _Field(int, int), _Field(_real_word, _real)
_DTYPE = _one_of(None, *FLOATS)
# The words of a ticket. First what is not compared as it stands:
_HEADER = ("phase", "refused", "columns", "rows", "draw")
_PHASES = ("the forward", "the backward")
# what the host knows,
_FIELDS = {
    "tokens": _one_of("the same on every rank", "each rank's own"),
    "labels of a row": _INT,
    "the rows of hidden": _INT,
    "the last dimension of hidden": _INT,
    "hidden's dtype": _DTYPE,
    "weight's dtype": _DTYPE,
    "bias's dtype": _DTYPE,
    "lora A's dtype": _DTYPE,
    "lora B's dtype": _DTYPE,
    "lora's rank": _INT,
    "lora's scale": _REAL,
    "ignore_index": _INT,
    "logit_scale": _REAL,
    "softcap": _REAL,
    "temperature": _REAL,
    "backward": _one_of("routed", "exact"),
    "tau of dhidden": _REAL,
    "tau of dweight": _REAL,
    "whether seed is given": _one_of(False, True),
    "check_labels": _one_of(False, True),
    "stats": _names(STATS),
    "the inputs that want a gradient": _names(INPUTS),
    "autocast's or the products' dtype": _DTYPE,
    "the engine": _one_of("reference", "cpu", "triton"),
    # of a teacher beside the head
    "kind": _one_of(None, *DIVERGENCES),
    "jsd_beta": _REAL,
    "labels_or_mask": _one_of(None, "a mask", "labels"),
    "the last dimension of ref_hidden": _INT,
    **{f"{name}'s dtype": _DTYPE for name in TEACHER},
    "ref_logit_scale": _REAL,
    "ref_softcap": _REAL,
}
# what the data is: exactly, and up to rounding (of the backward: its upstream gradients),
_EXACT = ("the number of completion tokens", "labels")
_ROUNDED = {
    "the forward": ("hidden", "lora A", "ref_hidden"),
    "the backward": tuple(f"the upstream gradient of {name}" for name in DIFFERENTIABLE),
}
_TOLERANCES = {"the forward": sketch.ROUNDING, "the backward": sketch.SAME_CODE}
# and a refusal's text, 8 bytes a word.
_TEXT = 64

_HOST = slice(len(_HEADER), len(_HEADER) + len(_FIELDS))
_DATA = slice(_HOST.stop, _HOST.stop + len(_EXACT))
_SKETCHES = slice(_DATA.stop, _DATA.stop + len(DIFFERENTIABLE) * sketch.SKETCH)
_MESSAGE = slice(_SKETCHES.stop, _SKETCHES.stop + _TEXT)


def _sketch(i: int) -> slice:
    start = _SKETCHES.start + i * sketch.SKETCH
    return slice(start, start + sketch.SKETCH)


class Call(NamedTuple):
    """One call as its ranks compare it; `rows` and `columns` may differ from rank to rank."""

    fields: dict[str, object]  # of _FIELDS
    seed: int | None  # as given
    draw: Tensor | None  # 0-d int64: the key, given or drawn
    columns: int
    rows: int = 0  # each rank's own


class Agreed(NamedTuple):
    """What follows of an exchange."""

    shards: VocabShards
    key: Tensor | None  # 0-d int64, the same on every rank
    rows: tuple[int, ...] = ()  # of each rank, where tokens are each rank's own
    poison: Tensor | None = None  # 0-d fp32, 0 or NaN: of a comparison that the host did not wait for


_known: WeakKeyDictionary = WeakKeyDictionary()  # group -> {what the host knows of a call: columns of every rank}


def _waits(device: torch.device) -> bool:
    """Whether the host may read the device's words in every call."""
    return device.type != "cuda"


def agree(
    group,
    call: Call,
    hidden: Tensor,
    labels: Tensor | None,
    lora_a: Tensor | None,
    ref_hidden: Tensor | None = None,
) -> Agreed:
    """Exchanges the tickets of a forward; ValueError on every rank, naming what differs and each rank's value.

    `labels` [N] or [N, K] and, of the rows they count, `hidden` [..., H] and `ref_hidden`:
    compared where given.
    """
    import torch.distributed as dist

    if dist.get_world_size(group) == 1:
        return Agreed(VocabShards.of(group, (call.columns,)), call.draw, (call.rows,))
    device = hidden.device
    host = [field.word(call.fields[name]) for name, field in _FIELDS.items()]
    words = _ticket("the forward", device, columns=call.columns, rows=call.rows, host=host)
    if call.draw is not None:
        words[_HEADER.index("draw")] = call.draw
    if labels is not None:
        counts = labels != call.fields["ignore_index"]
        words[_DATA] = torch.stack((counts.sum(), sketch.checksum(labels.reshape(-1))))
        counts = counts if counts.ndim == 1 else counts.any(1)
        words[_sketch(0)] = sketch.of_rows(hidden, counts).view(torch.int64)
        if ref_hidden is not None:
            words[_sketch(2)] = sketch.of_rows(ref_hidden, counts).view(torch.int64)
    if lora_a is not None:
        every = torch.ones(lora_a.shape[0], dtype=torch.bool, device=device)
        words[_sketch(1)] = sketch.of_rows(lora_a, every).view(torch.int64)
    tickets = _exchange(group, words)
    key, known = None, None
    if call.draw is not None:
        key = call.draw if call.seed is not None else tickets[0, _HEADER.index("draw")]
    if not _waits(device) and labels is not None:
        seen = _known.setdefault(group, {})
        known = seen.get((call.columns, *host))
    if known is None:
        known = _compared(tickets, "the forward", call.seed)
        if not _waits(device) and labels is not None:
            if len(seen) >= MOST_KNOWN:
                seen.clear()
            seen[(call.columns, *host)] = known
        rows = tuple(tickets[:, _HEADER.index("rows")].tolist()) if labels is None else ()
        return Agreed(VocabShards.of(group, known), key, rows)
    return Agreed(VocabShards.of(group, known), key, (), _poison(tickets, "the forward", call.seed is not None))


def agree_upstream(shards: VocabShards, *upstream: Tensor | None, own: bool = False):
    """The gradients of DIFFERENTIABLE, which every rank multiplies its part of the gradients with: ValueError on every
    rank where they differ. A loss that one rank alone scales would make gradients of shards that do not fit each
    other. `own`: they are each rank's own, and only which of them there are is compared."""
    if shards.size == 1:
        return upstream
    given = next(x for x in upstream if x is not None)
    words = _ticket("the backward", given.device)
    words[_DATA.start] = sum(1 << i for i, x in enumerate(upstream) if x is not None)
    for i, x in enumerate(upstream):
        if x is not None and not own:
            words[_sketch(i)] = sketch.of_vector(x.reshape(-1)).view(torch.int64)
    tickets = _exchange(shards.group, words)
    if _waits(given.device):
        _compared(tickets, "the backward", None)
        return upstream
    poison = _poison(tickets, "the backward")
    return tuple(None if x is None else x + poison.to(x.dtype) for x in upstream)


class announcing:  # a class, since torch 2.6 cannot trace a generator's context
    """What raises in here, before the ranks' exchange, raises on every rank of `group`; `of`: a tensor of the call."""

    def __init__(self, group, of: Tensor | None, phase: str = "the forward"):
        self.group, self.of, self.phase = group, of, phase

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if self.group is None or error is None:
            return
        if isinstance(error, Exception):
            _refuse(self.group, self.of, self.phase, error)
        elif torch.distributed.get_rank(self.group) >= 0:  # Ctrl-C: this rank does not wait for an exchange
            _tell(self.group, error)


def _refuse(group, of, phase: str, error: Exception) -> None:
    """Takes part in the exchange that the other ranks are in, and tells them why this one does not go on. Returns where
    all refuse, each with its own error."""
    import torch.distributed as dist

    if dist.get_rank(group) < 0 or dist.get_world_size(group) == 1:
        return
    device = of.device if isinstance(of, Tensor) else dist.distributed_c10d._get_pg_default_device(group)
    tickets = _exchange(group, _ticket(phase, device, text=f"{type(error).__name__}: {error}")).cpu()
    if not tickets[:, _HEADER.index("refused")].all():
        raise _error(tickets, phase, None) from error


def _ticket(phase: str, device, *, columns=0, rows=0, host=(), text: str | None = None) -> Tensor:
    words = [_PHASES.index(phase), int(text is not None), columns, rows, 0, *(host or [0] * len(_FIELDS))]
    words += [0] * (_MESSAGE.start - len(words))
    message = (text or "").encode()[: 8 * _TEXT].ljust(8 * _TEXT, b"\0")
    words += struct.unpack(f"<{_TEXT}q", message)
    # the host does not wait for the copy
    return torch.tensor(words, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def _exchange(group, words: Tensor) -> Tensor:
    """[ranks, words] of every rank."""
    import torch.distributed as dist

    tickets = words.new_empty(dist.get_world_size(group), words.shape[0])
    try:
        dist.all_gather(list(tickets.unbind(0)), words, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            "vocab_group: not every rank came to this call of fastdpo within the group's time-out: one raised before "
            f"it, or makes other calls{_told(group)}"
        ) from error
    return tickets


def _compared(tickets: Tensor, phase: str, seed: int | None) -> tuple[int, ...]:
    """Columns of every rank; waits."""
    tickets = tickets.cpu()
    error = _error(tickets, phase, seed)
    if error is not None:
        try:
            raise error
        finally:
            del error  # a frame whose error holds the frame would keep the callers' tensors until a collection
    return tuple(tickets[:, _HEADER.index("columns")].tolist())


def _sketches(tickets: Tensor) -> list[Tensor]:
    return tickets[:, _SKETCHES].contiguous().view(torch.float64).split(sketch.SKETCH, 1)


def _unequal(tickets: Tensor) -> Tensor:
    """0-d bool: what must agree word by word does not."""
    phases, exact = tickets[:, 0], tickets[:, _HOST.start : _DATA.stop]
    return (phases != phases[0]).any() | (exact != exact[0]).any()


def _error(tickets: Tensor, phase: str, seed: int | None) -> ValueError | None:
    """The same on every rank, of tickets on the host."""

    words = tickets.tolist()
    refused, draws = ([row[_HEADER.index(name)] for row in words] for name in ("refused", "draw"))
    compared = [(row[0], *row[_HOST.start : _SKETCHES.stop]) for row in words]
    if not any(refused) and len(set(compared)) == 1 and (seed is None or len(set(draws)) == 1):
        return None

    def each(values) -> str:
        return ", ".join(f"rank {rank} {value}" for rank, value in enumerate(values))

    def column(i: int) -> list[int]:
        return [row[i] for row in words]

    if any(refused):
        told = []
        for rank, flag in enumerate(refused):
            if flag:
                text = struct.pack(f"<{_TEXT}q", *words[rank][_MESSAGE]).rstrip(b"\0")
                told.append(f"rank {rank}: {text.decode(errors='ignore')}")
        return ValueError(f"vocab_group: refused by {'; by '.join(told)}")
    told = []
    if len(set(column(0))) > 1:
        told.append(f"what they are in: {each('is in ' + _PHASES[x] for x in column(0))}")
        return _differing(told)
    for i, (name, field) in enumerate(_FIELDS.items(), _HOST.start):
        if len(set(column(i))) > 1:
            told.append(f"{name}: {each(f'has {field.shown(word)}' for word in column(i))}")
    count, labels = column(_DATA.start), column(_DATA.start + 1)
    if len(set(count)) > 1 and phase == "the backward":
        parts = (" and ".join(name for i, name in enumerate(DIFFERENTIABLE) if x >> i & 1) or "none" for x in count)
        told.append(f"what has an upstream gradient: {each(f'has {names}' for names in parts)}")
    elif len(set(count)) > 1:
        told.append(f"the number of labels that are not ignored: {each(f'has {x}' for x in count)}")
    if len(set(labels)) > 1 and not told:
        told.append(f"labels, whose ids or order differ: {each(f'has checksum {x % 2**64:016x}' for x in labels)}")
    if seed is not None and len(set(draws)) > 1 and not told:
        told.append(f"seed: {each(f'has {x % 2**64}' for x in draws)}")
    if not told:
        for name, values in zip(_ROUNDED[phase], _sketches(tickets)):
            if sketch.differ(values, _TOLERANCES[phase]).any():
                shown = (f"has norm {row[-1]:.6g}, projection {row[0]:.6g}" for row in values.tolist())
                told.append(f"{name}, whose values differ: {each(shown)}")
    return _differing(told) if told else None


def _differing(told: list[str]) -> ValueError:
    return ValueError(
        f"vocab_group: its ranks must be given the same but for their shards; they differ in {'; in '.join(told)}"
    )


def _poison(tickets: Tensor, phase: str, with_seed: bool = False) -> Tensor:
    """0-d fp32: 0, or NaN where ranks differ in what changes from call to call; no wait."""
    refused, draws = (tickets[:, _HEADER.index(name)] for name in ("refused", "draw"))
    wrong = _unequal(tickets) | refused.any()
    if with_seed:
        wrong = wrong | (draws != draws[0]).any()
    for values in _sketches(tickets):
        wrong = wrong | sketch.differ(values, _TOLERANCES[phase]).any()
    return torch.where(wrong, torch.nan, 0.0).float()


# An engine that fails in the middle of a call, or Ctrl-C, leaves the other ranks waiting in the next exchange. The
# cause is left in the group's store, where a rank whose exchange has run into the group's time-out looks.

_FAILED = "fastdpo/failed"


@contextmanager
def telling(group):
    """Around what runs between the ranks' exchanges and has exchanges of its own."""
    try:
        yield
    except Exception as error:
        cause = _told(group)
        if cause:
            raise RuntimeError(f"vocab_group: another rank did not finish this call{cause}") from error
        _tell(group, error)
        raise
    except BaseException as error:
        _tell(group, error)
        raise


def _tell(group, error: BaseException) -> None:
    rank = torch.distributed.get_rank(group)
    with suppress(RuntimeError):  # a store that is gone with its rank hides no error
        _store(group).set(_FAILED, f"rank {rank} failed with {type(error).__name__}: {error}"[:2000])


def _told(group) -> str:
    store = _store(group)
    return f": {store.get(_FAILED).decode()}" if store.check([_FAILED]) else ""


def _store(group):
    return torch.distributed.distributed_c10d._get_process_group_store(group)
