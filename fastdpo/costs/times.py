"""Expected seconds of the head and the loss of one step on a GPU, per way to compute them: **modelled**.

fastdpo's are counted from the launches of its Triton engine with the plain forward kernel, live pairs as `live.py` has
them; peers' are floors of their algorithms, which nobody is faster than: `peers.py`.
"""

from __future__ import annotations

import torch

from ..head import taus
from .gpus import Gpu
from .live import trained
from .memory import Batch
from .peers import ALGORITHMS, PUBLISHED
from .steps import STEP, Shape, step_cost


def two_products(batch: Batch, gpu: Gpu) -> float:
    """Of the head's two plain forwards, over completion tokens alone: what no step undercuts."""
    return 2 * Shape(batch.tokens, batch.vocab, batch.hidden).one_pass / gpu.flops


def expected(path: str, batch: Batch, gpu: Gpu, dtype: torch.dtype = torch.bfloat16) -> float:
    """Raises ImportError where fastdpo's launches cannot be recorded: Triton is not installed."""
    if path.startswith("fastdpo"):
        return _fastdpo(path.removeprefix("fastdpo "), batch, gpu, dtype)
    every = path in ("eager", "liger")  # they compute the prompts' rows as well
    shape = Shape(batch.all_rows if every else batch.tokens, batch.vocab, batch.hidden, dtype)
    return ALGORITHMS[path].step(shape, gpu, frozen=batch.frozen, reference=batch.reference)


def _fastdpo(backward: str, batch: Batch, gpu: Gpu, dtype: torch.dtype) -> float:
    try:
        from ..ops.triton.launch import Target
    except ImportError as error:
        raise ImportError(
            f"fastdpo's time is counted from its Triton launches: pip install triton ({error})"
        ) from error
    shape = Shape(batch.tokens, batch.vocab, batch.hidden, dtype)
    live = live_hidden = None
    if backward == "routed":
        tau = taus(None, not batch.frozen)
        live, live_hidden = (trained(batch.tokens, batch.vocab, t) for t in (min(tau), tau[0]))
    step = step_cost(
        shape, live, live_hidden, cache=gpu.cache, frozen=batch.frozen, backward=backward, tau=None,
        target=Target(gpu.capability, gpu.multiprocessors), parts=STEP if batch.reference else STEP[:2],
    )  # fmt: skip
    return step.expected(gpu)


def against_published(path: str) -> list[str]:
    """What the model says of a peer over what somebody has published, with where; none: nothing is published."""
    from .gpus import GPUS

    found = []
    for one in PUBLISHED:
        if one.algorithm == path:
            modelled = ALGORITHMS[path].seconds(one.shape, GPUS[one.gpu], **one.parts)
            ratio = f"{modelled / one.seconds:.2f} of the published {one.seconds * 1e3:.0f} ms"
            found.append(f"{ratio} on an {one.gpu} ({one.source})")
    return found
