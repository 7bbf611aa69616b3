"""Items of work that the programs of one launch take in order, some of which need the results of earlier ones.

Items are numbered so that each needs only items of lower numbers, and a program takes the lowest number that is left:
whatever an item waits for is done, or in the hands of a program that runs. So there is no deadlock, however few of the
programs run at the same time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take(taken):
    """The next item; `taken` [1] int32 counts them, from 0."""
    return tl.atomic_add(taken, 1, sem="relaxed")


@triton.jit
def wait(done, least):
    """Until `least` items are done: what their programs wrote is then seen by loads, though not by TMA's."""
    while tl.atomic_add(done, 0, sem="acquire") < least:
        pass


@triton.jit
def finished(done):
    """One more item of those that `done` [1] int32 counts, from 0, is."""
    tl.debug_barrier()
    tl.atomic_add(done, 1, sem="release")
