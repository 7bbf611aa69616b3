"""An error or Ctrl-C in the middle of a call: inputs, modes, models and memory are as before, and so is the next call.

A sample of places; ``python -m tests.interruptions`` goes through all.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from interruption_cases import CASES
from interruptions import problems

import fastdpo
from fastdpo.distributed import handshake

OF_MODELS = ("a patched model", "lazy logits", "a split head", "patching")


@pytest.mark.parametrize("signals", [False, True], ids=["allocations", "signals"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_thrown_into_a_call_leaves_nothing_behind(name, signals):
    if name in OF_MODELS:
        pytest.importorskip("transformers")
    found = problems(CASES[name], signals, every=False, most=10)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["patching", "lazy logits"])
def test_ctrl_c_at_any_line_that_patches_leaves_a_model_that_can_be_patched(name):
    pytest.importorskip("transformers")
    files = ("probe.py", "huggingface.py", "head_call.py", "lazy/head.py")
    found = problems(CASES[name], True, every=False, most=50, files=files)
    assert not found, "\n".join(found)


def test_the_check_sees_a_leak_a_changed_input_and_a_mode_that_stays():
    kept = []

    def case():
        x = torch.ones(3)

        def run():
            torch.set_grad_enabled(False)
            x.add_(1)
            kept.append(torch.ones(1))
            fastdpo.selective_log_softmax(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
            torch.set_grad_enabled(True)
            x.sub_(1)
            kept.pop()
            return {"x": x.clone()}

        return {"x": x}, run

    found = "\n".join(problems(case, False, every=False, most=1))
    for what in ("x has changed", "grad mode: False", "tensors stay", "gives other values"):
        assert what in found, found


def test_ranks_that_differ_raise_an_error_that_keeps_no_tensor_of_the_call():
    """Whoever has caught it and let it go has no cycle of the error and the frame that raised it."""

    class Held:
        pass

    def call(held):
        words = handshake._ticket("the forward", "cpu", columns=1, text="told")
        handshake._compared(torch.stack((words, words)), "the forward", None)

    held = Held()
    alive = weakref.ref(held)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="told"):
            call(held)
        del held
        gc_would_find = alive() is not None
    finally:
        gc.enable()
    assert not gc_would_find
