"""A child process of the suite: its lines come as it prints them, and nothing of it outlives its limit or the suite."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TIMED_OUT = 124
LOST = 3  # of a worker that the GPU serves no more


@dataclass
class Ended:
    status: int  # TIMED_OUT: killed at its limit; negative: by that signal
    output: str  # the end of what it printed
    seconds: float

    @property
    def cause(self) -> str:
        """Why it failed, in one line."""
        if self.status == TIMED_OUT:
            return f"no end after {self.seconds:.0f} s: killed"
        last = next((line for line in reversed(self.output.splitlines()) if line.strip()), "nothing printed")
        return f"exit status {self.status}: {last.strip()[:300]}"


class Stopped(BaseException):
    """The suite itself was told to end."""


def stop_on_signals() -> None:
    """SIGTERM and SIGINT raise Stopped: what was measured is on disk, the child is killed on the way out."""

    def stop(number, frame):
        raise Stopped(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def run(
    command: Sequence[str],
    *,
    limit: float,
    environment: Mapping[str, str],
    folder: os.PathLike,
    show: Callable[[str], None],
    take: Callable[[str], bool] = lambda line: False,
    is_over: Callable[[], bool] = lambda: False,
) -> Ended:
    """Runs to the end, to the limit in seconds, or until `is_over`. A line of stdout is `take`n or shown at once."""
    begin = time.monotonic()
    try:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", bufsize=1, preexec_fn=_in_its_own_group,
        )  # fmt: skip
    except OSError as error:
        show(str(error))
        return Ended(127, str(error), 0.0)
    lines: queue.Queue = queue.Queue()
    readers = [
        threading.Thread(target=_read, args=(child.stdout, lines, True), daemon=True),
        threading.Thread(target=_read, args=(child.stderr, lines, False), daemon=True),
    ]
    for reader in readers:
        reader.start()
    tail: deque[str] = deque(maxlen=400)

    def receive(wait: float) -> bool:
        try:
            line, may_be_taken = lines.get(timeout=wait)
        except queue.Empty:
            return False
        if not (may_be_taken and take(line)):
            tail.append(line)
            show(line)
        return True

    timed_out = False
    try:
        while child.poll() is None:
            receive(0.1)
            if time.monotonic() - begin > limit or is_over():
                timed_out = True
                break
    finally:
        _kill(child)  # also what it started and left behind
    for reader in readers:
        reader.join(timeout=1.0)
    while receive(0.0 if not any(reader.is_alive() for reader in readers) else 0.05):
        pass
    return Ended(
        TIMED_OUT if timed_out or child.returncode is None else child.returncode,
        "\n".join(tail),
        time.monotonic() - begin,
    )


def _read(stream, lines: queue.Queue, may_be_taken: bool) -> None:
    for line in stream:
        lines.put((line.rstrip("\n"), may_be_taken))


def _kill(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that the driver holds does not end
        child.wait(timeout=20)


def _in_its_own_group() -> None:
    """Killed as a whole; and by the kernel, should the suite be killed before it can do so."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
