"""Calls of the native extension with arguments that no caller gives: each is an error, or a result; never a crash, and
never a byte written outside of the tensors given.

python -m tests.fuzz_bindings [--minutes 10] [--seed 1] [--case 2]

Real calls are recorded; a case is one of them with a few of its arguments changed, and is its seed and number again,
whatever ran before. A process of its own runs them: a crash is reported with the arguments that made it.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

BAND = 256  # bytes before and after a tensor
PATTERN = 0xA5
ERRORS = (TypeError, ValueError, RuntimeError)
SECONDS = 20  # of one case: more is a loop without end
Fields = dict[str, object]


class Recorder:
    """An extension that keeps the arguments of its calls, as they were before."""

    def __init__(self, extension):
        self.extension, self.calls = extension, []

    def __getattr__(self, name: str):
        found = getattr(self.extension, name)
        return functools.partial(self._call, name, found) if callable(found) else found

    def _call(self, name: str, function: Callable, *given, **fields):
        if not given:
            self.calls.append((name, each_tensor(kept(), fields)))
        return function(*given, **fields)


def each_tensor(function: Callable[[Tensor], Tensor], x):
    """`x` with the function of every tensor in it."""
    if isinstance(x, dict):
        return {name: each_tensor(function, value) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        kind = list if isinstance(x, list) else tuple
        return kind(each_tensor(function, value) for value in x)
    return function(x) if isinstance(x, Tensor) else x


def kept() -> Callable[[Tensor], Tensor]:
    """Copies of the same layout; of the same tensor the same copy."""
    copies = {}

    def copy(x: Tensor) -> Tensor:
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if key not in copies:
            copies[key] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        return copies[key]

    return copy


class Memory:
    """Tensors between bands whose bytes nobody may change; `exact`: without, in a piece of memory of their size."""

    def __init__(self, exact: bool):
        self.exact, self.watched, self.placed = exact, [], {}

    def place(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.numel() == 0:
            return x
        if id(x) not in self.placed:
            self.placed[id(x)] = self._place(x), x
        return self.placed[id(x)][0]

    def _place(self, x: Tensor) -> Tensor:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        if self.exact:
            made = torch.empty(reach, dtype=x.dtype).as_strided(x.shape, x.stride())
        else:
            buffer = torch.full((2 * BAND + reach * x.itemsize,), PATTERN, dtype=torch.uint8)
            inside = buffer[BAND : BAND + reach * x.itemsize].view(x.dtype)
            made = inside.as_strided(x.shape, x.stride(), inside.storage_offset())
            theirs = torch.zeros(reach, dtype=torch.bool)
            theirs[torch.arange(reach).as_strided(x.shape, x.stride()).flatten()] = True
            free = torch.ones(len(buffer), dtype=torch.bool)
            free[BAND : BAND + reach * x.itemsize] = ~theirs.repeat_interleave(x.itemsize)
            self.watched.append((buffer, free))
        return made.copy_(x) if min((s for s, n in zip(x.stride(), x.shape) if n > 1), default=1) > 0 else x

    def intact(self) -> bool:
        return all(bool((buffer[free] == PATTERN).all()) for buffer, free in self.watched)


# Changes of one argument: (random, value, other tensors of the call) -> value.

INTEGERS = (
    -1,
    0,
    1,
    2,
    3,
    127,
    128,
    129,
    2**31 - 1,
    2**31,
    2**48,
    2**48 + 1,
    2**62,
    2**63 - 1,
    -(2**31),
    -(2**63),
    2**64,
)
FLOATS = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 5e-324)
STRANGE = (None, "x", 1.5, [], (), {}, object(), torch.tensor(1))


def number(rng: random.Random, x, _):
    if isinstance(x, bool):
        return rng.choice((not x, None, 1, "x"))
    if isinstance(x, float):
        return rng.choice((*FLOATS, rng.choice(STRANGE)))
    return rng.choice((*INTEGERS, x - 1, x + 1, 2 * x, 10**6, rng.choice(STRANGE)))


def misaligned(rng: random.Random, x: Tensor, _) -> Tensor:
    data = torch.zeros(x.numel() * x.itemsize + 1, dtype=torch.uint8).numpy()[1:]
    return torch.frombuffer(data, dtype=x.dtype).view(x.shape) if x.numel() and x.dtype != torch.bool else x


def released(rng: random.Random, x: Tensor, _) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def overlapping(rng: random.Random, x: Tensor, _) -> Tensor:
    """Of its size, with rows that share memory."""
    if x.ndim != 2 or x.shape[0] < 2:
        return x[:1].expand(x.shape) if x.ndim and len(x) else x
    stride = rng.choice((0, 1, x.shape[1] // 2))
    return x.new_zeros(stride * x.shape[0] + x.shape[1]).as_strided(x.shape, (stride, 1))


def absurd_strides(rng: random.Random, x: Tensor, _) -> Tensor:
    shape = rng.choice(((0, *x.shape[1:]), (*x.shape[:-1], 0)))
    strides = [rng.choice((0, 1, 2**31, 2**48, 2**60)) for _ in shape]
    return x.new_empty(0).as_strided(shape, strides)


def one_of_others(rng: random.Random, x: Tensor, others: list[Tensor]) -> Tensor:
    """Memory of another argument, from its beginning or one row on."""
    fitting = [y for y in others if y.device.type == "cpu" and y.is_contiguous() and y.nbytes >= x.nbytes > 0]
    if not fitting:
        return x
    flat = rng.choice(fitting).view(-1).view(torch.uint8)
    flat = flat[rng.choice((0, len(flat) - x.nbytes)) // 8 * 8 :][: x.nbytes]
    return flat.view(x.dtype).view(x.shape) if flat.data_ptr() % 8 == 0 else x


def other_values(rng: random.Random, x: Tensor, _) -> Tensor:
    x = x.clone()
    if x.numel() == 0 or not x.is_contiguous() or x.dtype == torch.bool:
        return x
    flat = x.view(-1)
    for _ in range(rng.choice((1, 1, 2, len(flat)))):
        at = rng.randrange(len(flat))
        if x.is_floating_point():
            flat[at] = rng.choice(FLOATS)
        elif x.dtype == torch.uint8:
            flat[at] = rng.randrange(256)
        else:
            most = torch.iinfo(x.dtype)
            near = max(most.min, min(most.max, int(flat[at]) + rng.choice((-1, 1, 128))))
            flat[at] = rng.choice((-1, 0, 1, near, near, int(flat[rng.randrange(len(flat))]), most.min, most.max))
    return x


TENSORS = (
    lambda rng, x, _: rng.choice(STRANGE),
    lambda rng, x, _: None,
    lambda rng, x, _: x.to(rng.choice((torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32))),
    lambda rng, x, _: x.to("meta"),
    lambda rng, x, _: x[:-1],
    lambda rng, x, _: x[..., :-1] if x.ndim else x,
    lambda rng, x, _: torch.cat((x, x)),
    lambda rng, x, _: x[:0],
    lambda rng, x, _: x.T.contiguous().T if x.ndim == 2 else x.repeat_interleave(2)[::2],
    lambda rng, x, _: x.T if x.ndim == 2 else x[:, None],
    lambda rng, x, _: x.flatten(),
    lambda rng, x, _: torch._neg_view(x) if x.is_floating_point() else x,
    misaligned,
    released,
    overlapping,
    absurd_strides,
    one_of_others,
    *[other_values] * 8,  # what only csrc can see
)


def changed(rng: random.Random, x, others: list[Tensor]):
    if isinstance(x, Tensor):
        try:
            return rng.choice(TENSORS)(rng, x, others)
        except (RuntimeError, IndexError, TypeError):  # a change that this tensor does not have
            return None
    if isinstance(x, (int, float)):
        return number(rng, x, others)
    if x is None:
        return rng.choice((*STRANGE, *others, torch.zeros(3), torch.zeros(3, dtype=torch.int64)))
    if rng.random() < 0.2:
        return rng.choice(STRANGE)
    items = list(x.items() if isinstance(x, dict) else x)
    if items and rng.random() < 0.8:
        at = rng.randrange(len(items))
        if isinstance(x, dict):
            items[at] = (items[at][0], changed(rng, items[at][1], others))
        else:
            items[at] = changed(rng, items[at], others)
    else:
        items = rng.choice((items[:-1], items + items[:1], items * 30))
    return type(x)(items)


def mutated(rng: random.Random, fields: Fields) -> Fields:
    fields, others = dict(fields), []
    each_tensor(others.append, fields)
    for name in rng.sample(list(fields), min(len(fields), rng.choice((0, 1, 1, 1, 1, 2, 2, 3)))):
        if rng.random() < 0.02:
            del fields[name]
        else:
            fields[name] = changed(rng, fields[name], others)
    return fields


def described(x) -> str:
    def text(t: Tensor) -> str:
        layout = f"{t.dtype}".removeprefix("torch.") + f"{list(t.shape)} strides {list(t.stride())} {t.device}"
        small = (
            t.numel() <= 40 and t.device.type == "cpu" and (not t.numel() or t.data_ptr()) and not t.is_floating_point()
        )
        return f"<{layout}{f' {t.tolist()}' if small else ''}>"

    class Text(str):
        __repr__ = str.__str__

    return repr(each_tensor(lambda t: Text(text(t)), x))


class Case:
    """Of a seed and a number."""

    def __init__(self, calls: list[tuple[str, Fields]], seed: int, index: int):
        rng = random.Random(f"{seed} {index}")
        by_name: dict[str, list[Fields]] = {}
        for name, fields in calls:
            by_name.setdefault(name, []).append(fields)
        self.name = rng.choice(sorted(by_name))
        self.memory = Memory(exact=rng.random() < 0.5)
        recorded = each_tensor(self.memory.place, rng.choice(by_name[self.name]))
        self.fields = mutated(rng, recorded)
        self.changed = any(name not in self.fields or self.fields[name] is not x for name, x in recorded.items())

    def run(self, extension) -> str:
        """What came of it: "right" or the error's type."""
        try:
            getattr(extension, self.name)(**self.fields)
            found = "right"
        except ERRORS as error:
            assert self.changed, f"a real call is refused: {error}"
            found = type(error).__name__
        assert self.memory.intact(), "bytes outside of the tensors were written"
        return found


def serve(seed: int, cases: Iterator[int], until: float, log: Path, cuda: bool) -> None:
    """In a process of its own: `log` holds the case that runs."""
    importlib.import_module("tests.sanitized_extension")  # before fastdpo is imported
    record = importlib.import_module("tests.fuzz_calls").record

    extension, calls = record(seed, cuda)
    counts: dict[str, int] = {}
    number_of = 0
    faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open(log, "wb", buffering=0) as out:
        for index in cases:
            if time.monotonic() > until:
                break
            case = Case(calls, seed, index)
            text = f"{index} {case.name}(**{described(case.fields)})\n".encode()
            out.seek(0)
            out.truncate()
            out.write(text)
            signal.alarm(SECONDS)
            found = case.run(extension)
            signal.alarm(0)
            key = f"{case.name} {found}"
            counts[key] = counts.get(key, 0) + 1
            number_of += 1
    print(f"{number_of} cases of {len({name for name, _ in calls})} functions, seed {seed}")
    for key in sorted(counts):
        print(f"  {counts[key]:6d} {key}")


def fuzz(seed: int, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit status, output) of a process with these arguments; where it crashed, with what."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "case"
        command = [sys.executable, "-m", "tests.fuzz_bindings", "--seed", str(seed), "--log", str(log), *arguments]
        root = Path(__file__).parents[1]
        environment = {**(environment or os.environ), "OMP_NUM_THREADS": "2"}
        paths = [str(root), str(root / "tests"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output = done.stdout
        if done.returncode:
            last = log.read_text(errors="replace") if log.exists() else "before the first case"
            case = last.split(" ")[0]
            output += f"status {done.returncode} of case {last}\n"
            kind = " --cuda" if "--cuda" in arguments else ""
            output += f"again: python -m tests.fuzz_bindings --seed {seed} --case {case}{kind}\n"
        return done.returncode, output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=2**40, help="at most so many")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels, compiled for the CPU")
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.log is None:
        status, output = fuzz(given.seed, *sys.argv[1:])
        print(output, end="")
        return status
    cases = iter(range(given.cases)) if given.case is None else iter([given.case])
    serve(given.seed, cases, time.monotonic() + 60 * given.minutes, given.log, given.cuda)
    return 0


if __name__ == "__main__":
    sys.exit(main())
