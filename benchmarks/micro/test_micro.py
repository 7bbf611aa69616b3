"""Micro-benchmarks of the CPU path, small enough to run at every commit: `make bench-micro`, `make bench-compare`.

One call each, under pytest-benchmark: token log-probs of every peer, forward and backward; the kernels on given
logits; the preference loss. Not collected by `make test`.
"""

from __future__ import annotations

import pytest
import torch

import fastdpo
from benchmarks import inputs
from benchmarks.peers import SELECTIVE_LOGPS, TOKEN_LOGPS, Unavailable

TOKENS, VOCAB, HIDDEN = 256, 16384, 256


@pytest.fixture(scope="module")
def head() -> inputs.HeadInputs:
    torch.manual_seed(0)
    return inputs.synthetic_head(num_tokens=TOKENS, vocab_size=VOCAB, hidden_size=HIDDEN)


def measured(benchmark, call) -> None:
    """Runs `call` once first, which says why a peer cannot run here."""
    try:
        call()
    except Unavailable as error:
        pytest.skip(str(error))
    benchmark(call)


@pytest.mark.parametrize("peer", TOKEN_LOGPS)
@pytest.mark.benchmark(group="forward")
def test_forward(benchmark, head, peer):
    with torch.no_grad():
        measured(benchmark, lambda: TOKEN_LOGPS[peer](head.hidden, head.weight, head.labels))


BACKWARD = {
    **TOKEN_LOGPS,
    "fastdpo exact": lambda h, w, y: fastdpo.linear_logps(h, w, y, backward="exact"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("peer", BACKWARD)
@pytest.mark.benchmark(group="forward and backward")
def test_forward_and_backward(benchmark, head, peer, frozen):
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, weight]
    measured(benchmark, lambda: torch.autograd.grad(BACKWARD[peer](hidden, weight, head.labels).sum(), wanted))


SELECTIVE = {**SELECTIVE_LOGPS, "fastdpo": fastdpo.selective_log_softmax}


@pytest.mark.parametrize("peer", SELECTIVE)
@pytest.mark.benchmark(group="given logits")
def test_selective_log_softmax(benchmark, head, peer):
    logits = (head.hidden @ head.weight.T).requires_grad_()
    measured(benchmark, lambda: torch.autograd.grad(SELECTIVE[peer](logits, head.labels).sum(), logits))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sppo_hard"])
@pytest.mark.benchmark(group="preference loss")
def test_preference_loss(benchmark, loss_type):
    logps = [torch.randn(64, requires_grad=i < 2) for i in range(4)]
    measured(
        benchmark,
        lambda: torch.autograd.grad(fastdpo.preference_loss(*logps, loss_type=loss_type).loss, logps[:2]),
    )
