"""How far a long command is, on standard error: by rich where it is installed, in a line otherwise; nothing where
nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    def step(self, what: str) -> None:
        """`what` begins now, and what came before has ended."""


class _Silent:
    def step(self, what: str) -> None:
        pass


class _Line:
    def __init__(self, total: int):
        self.total, self.begun = total, 0

    def step(self, what: str) -> None:
        self.begun += 1
        print(f"\r\x1b[K[{self.begun}/{self.total}] {what}", end="", file=sys.stderr, flush=True)


class _Rich:
    def __init__(self, progress, total: int):
        self.progress, self.task, self.begun = progress, progress.add_task("", total=total), 0

    def step(self, what: str) -> None:
        self.progress.update(self.task, description=what, completed=self.begun)
        self.begun += 1


@contextmanager
def progress(total: int) -> Iterator[Bar]:
    """Of `total` steps, each announced by `bar.step(what)`; what is shown is gone at the end."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        try:
            yield _Line(total)
        finally:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield _Rich(shown, total)
