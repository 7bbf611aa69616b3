"""What is thrown into the middle of a call, at one place after the other, and what must be as it was afterwards.

    allocations     every call of fastdpo's Python into torch or the native extension raises: all of its allocations are
                    made by one of these
    signals         KeyboardInterrupt where CPython looks for signals, when a function begins and after one in C, and at
                    every line; but for the lines that clean up, which run as one on the way out

``python -m tests.interruptions`` goes through every place of every case, the tests through each line's first and last.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import inspect
import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
PACKAGE = str(FOLDER.parent / "fastdpo") + "/"
ERRORS = (torch.OutOfMemoryError, MemoryError)
IMPORTED = ("<frozen", "importlib")


@functools.cache
def cleaning(path: str) -> frozenset[int] | None:
    """The lines of a file's `finally` blocks and `except` handlers. None of another's file."""
    found: set[int] = set()
    if not path.startswith(PACKAGE):
        return None
    for node in ast.walk(ast.parse(Path(path).read_text())):
        blocks = [getattr(node, "finalbody", []), *(x.body for x in getattr(node, "handlers", []))]
        for statement in itertools.chain(*blocks):
            found.update(range(statement.lineno, statement.end_lineno + 1))
    return frozenset(found)


@functools.cache
def entered(path: str) -> frozenset[int]:
    """The lines of a file's `with` statements, which come again when the block is left, where torch's own context
    managers could not be left any more; and of `try`, which do nothing."""
    tree = ast.walk(ast.parse(Path(path).read_text()))
    return frozenset(node.lineno for node in tree if isinstance(node, (ast.With, ast.Try)))


def _of_ours(frame) -> bool:
    return cleaning(frame.f_code.co_filename) is not None


def _inside_cleaning(frame) -> bool:
    """Whether this frame, or one of ours that called it, cleans up."""
    while frame is not None:
        lines = cleaning(frame.f_code.co_filename)
        if lines and frame.f_lineno in lines:
            return True
        frame = frame.f_back
    return False


def _is_generator(frame) -> bool:
    """Which is entered to be closed, too, where an error goes nowhere."""
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


class Thrower:
    """Counts places; at the one with the number `at` it raises. `where`: the places seen, as (file, line, what)."""

    def __init__(self, signals: bool, at: int | None = None):
        self.signals, self.at, self.where = signals, at, []
        self.before = sys.gettrace()  # coverage's, which goes on afterwards

    def _place(self, frame, what: str) -> None:
        self.where.append((frame.f_code.co_filename, frame.f_lineno, what))
        if self.at is not None and len(self.where) == self.at + 1:
            self.at = None
            self._leave()
            raise KeyboardInterrupt if self.signals else ERRORS[len(self.where) % len(ERRORS)](f"{self.where[-1]}")

    def _profile(self, frame, event, function) -> None:
        if not _of_ours(frame) or _inside_cleaning(frame):
            return
        if event == ("c_return" if self.signals else "c_call"):
            if self.signals or _allocates(function):
                self._place(frame, event)
        elif event == "call" and self.signals and not _is_generator(frame):
            self._place(frame, event)

    def _trace(self, frame, event, _):
        if not _of_ours(frame):
            return None
        path, line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and line not in entered(path) and not _is_generator(frame) and not _inside_cleaning(frame):
            self._place(frame, event)
        return self._trace

    def __enter__(self) -> Thrower:
        if self.signals:
            sys.settrace(self._trace)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_) -> None:
        self._leave()

    def _leave(self) -> None:
        sys.settrace(self.before), sys.setprofile(None)


def _allocates(function) -> bool:
    """Whether a function in C is torch's or the extension's: others keep nothing of any size."""
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__module__", None) or type(owner).__module__
    return isinstance(owner, torch.Tensor) or str(name).split(".")[0] in ("torch", "fastdpo")


def places(run: Callable[[], object], signals: bool, every: bool, files: tuple[str, ...] = ("",)) -> list[int]:
    """The numbers of the places of `run` in files of such names: all, or the first and the last of each line."""
    with Thrower(signals) as thrower:
        run()
    numbered = [(number, place) for number, place in enumerate(thrower.where) if place[0].endswith(files)]
    if every:
        return [number for number, _ in numbered]
    first, last = {}, {}
    for number, place in numbered:
        first.setdefault(place, number)
        last[place] = number
    return sorted({*first.values(), *last.values()})


def flags() -> dict[str, object]:
    """What a call may change for a while, of torch and of fastdpo."""
    from fastdpo.models import head_call
    from fastdpo.models.lazy import head as lazy_head
    from fastdpo.ops.triton import special

    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "threads": torch.get_num_threads(),
        "hooks on saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "a model's call": head_call._STATE.call,
        "lazy options": lazy_head._ACTIVE.__dict__.get("options", {}),
        "locks": (lazy_head._LOCK.locked(), head_call._PLACING.locked()),
        "forced kernels": list(special._forced),
    }


def same(found: dict, expected: dict) -> bool:
    """Bit by bit, NaN like NaN."""
    return found.keys() == expected.keys() and all(
        torch.equal(x.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))
        if x.ndim
        else torch.equal(x, expected[name])
        for name, x in found.items()
    )


def live_tensors() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def in_another_thread(run: Callable[[], dict]) -> dict:
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join(60)
    if not found:
        raise AssertionError("a call in another thread hangs or raises")
    return found[0]


def problems(
    case: Callable[[], tuple[dict, Callable]],
    signals: bool,
    every: bool,
    most: int | None = None,
    files: tuple[str, ...] = ("",),
) -> list[str]:
    """Goes through a case's places, or so many; what was wrong after which. `case()` gives what the caller owns,
    by name, and a function of nothing that computes tensors by name from it."""
    owned, run = case()
    before = {name: x.detach().clone() for name, x in owned.items()}
    expected, calm = run(), flags()
    numbers = places(run, signals, every, files)
    if most is not None:  # spread over all
        numbers = numbers[:: -(-len(numbers) // most)]
    wrong = []
    gc.collect()
    gc.freeze()  # what there is already need not be looked at
    gc.disable()
    try:
        tensors = live_tensors()
        for number in numbers:
            thrower = Thrower(signals, number)
            told = _throw_into(run, thrower)
            place = "{}:{} ({})".format(*thrower.where[-1]) if thrower.where else "nowhere"

            def note(what: str, place: str = place) -> None:
                wrong.append(f"{place}: {what}")

            if told:
                note(told)
            if live_tensors() != tensors:
                found = gc.collect()
                note(f"{live_tensors() - tensors} tensors stay, and {found} objects in cycles were collected")
                tensors = live_tensors()
            for name, value in flags().items():
                if value != calm[name]:
                    note(f"{name}: {value}")
            torch.set_grad_enabled(True)
            for name, x in owned.items():
                if not torch.equal(x.detach(), before[name]):
                    note(f"{name} has changed")
                if x.grad is not None:
                    note(f"{name} has a gradient")
            try:
                if not same(run(), expected):
                    note("the next call gives other values")
            except Exception as error:
                note(f"the next call raises {type(error).__name__}: {error}")
            if len(wrong) > 50:
                break
        try:
            if not same(in_another_thread(run), expected):
                wrong.append("another thread's call gives other values")
        except AssertionError as error:
            wrong.append(str(error))
    finally:
        gc.enable()
        gc.unfreeze()
    return wrong


def _throw_into(run: Callable[[], object], thrower: Thrower) -> str | None:
    """In a frame of its own, which takes the error and its traceback along."""
    try:
        with thrower:
            run()
    except (KeyboardInterrupt, *ERRORS):
        return None
    except Exception as error:  # a torch of C++ in between tells it in its own words
        known = "KeyboardInterrupt" in str(error) or any(kind.__name__ in str(error) for kind in ERRORS)
        return None if known else f"another error comes out, {type(error).__name__}: {error}"
    return "nothing was raised" if thrower.at is not None else None


def main() -> int:
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    from interruption_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--few", action="store_true", help="the first and the last place of each line")
    parser.add_argument("--most", type=int, help="so many places of each case, spread over all")
    args = parser.parse_args()
    failed = 0
    for name in args.cases:
        for signals in (False, True):
            found = problems(CASES[name], signals, not args.few, args.most)
            failed += len(found)
            print(f"{name}, {'signals' if signals else 'allocations'}: {len(found)} problems")
            print("".join(f"    {line}\n" for line in dict.fromkeys(found)), end="", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
