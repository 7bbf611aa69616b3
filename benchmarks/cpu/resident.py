"""Peak resident memory of one call, and the same in a process of its own. Linux only."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(call: Callable[[], object], limit: float | None = None) -> float:
    """MiB by which the resident set grows at most while `call` runs; above `limit` MiB the process ends there and then,
    with a line that says so."""
    base = peak = resident()
    running = True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, resident())
            if limit is not None and peak - base > limit * 2**20:
                print(f"more than {limit:g} MiB", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        running = False
        watcher.join()
    return (peak - base) / 2**20


def in_child(*command) -> tuple[float | None, str | None]:
    """(the number that ``python command`` prints last, None), or (None, the last line of its error)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return float(done.stdout.split()[-1]), None
