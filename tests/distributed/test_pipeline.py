"""torch.distributed.pipelining on two ranks: losses and gradients of a DPO batch as of one process in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from heads import relative_error
from ranks import Ranks
from torch import nn
from torch.distributed import pipelining

import fastdpo
from fastdpo.microbatches import interleave, paired, restore

V, H, T, PAIRS, CHUNKS = 300, 16, 6, 6, 3
SCHEDULES = {  # and the stages of each rank
    "ScheduleGPipe": [[0], [1]],
    "Schedule1F1B": [[0], [1]],
    "ScheduleInterleaved1F1B": [[0, 2], [1, 3]],
    "ScheduleZBVZeroBubble": [[0, 3], [1, 2]],
}


class Mixed(nn.Module):
    """A layer that sees all tokens of its sequence, and no other sequence."""

    def __init__(self):
        super().__init__()
        self.tokens, self.features = nn.Linear(T, T), nn.Linear(H, H)

    def forward(self, x):
        return x + torch.tanh(self.features(x + self.tokens(x.transpose(1, 2)).transpose(1, 2)))


class Last(Mixed):
    """Its head is a parameter of the stage, whose gradient the schedule scales; the loss reads it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(H, V)


def _loss_of(head):
    def loss(hidden, labels, ref_logps):
        return fastdpo.linear_dpo_loss(
            hidden, head.weight, labels, bias=head.bias, ref_logps=ref_logps, backward="exact", beta=0.5
        ).loss

    return loss


def _model(num_stages: int) -> list[nn.Module]:
    layers = [Mixed() for _ in range(num_stages - 2)]
    return [nn.Sequential(nn.Embedding(V, H), Mixed()), *layers, Last()]


def _trained(rank, size, name, stages, batch, order):
    """{stage: gradients}, losses and hidden states of the last stage's rank. `order`: of what is cut."""
    mine, last = SCHEDULES[name][rank], len(stages) - 1
    modules = {index: copy.deepcopy(stages[index]) for index in mine}
    made = [
        pipelining.PipelineStage(module, index, len(stages), torch.device("cpu")) for index, module in modules.items()
    ]
    loss_fn = paired(_loss_of(modules[last].head)) if last in modules else paired(_loss_of(None))
    schedule = getattr(pipelining, name)(made[0] if len(mine) == 1 else made, CHUNKS, loss_fn=loss_fn)
    given, losses = {}, []
    if last in modules:
        batch_of_loss = {"labels": batch["labels"], "ref_logps": batch["ref_logps"]}
        given = {"target": order(torch.arange(2 * PAIRS)), "losses": losses, "loss_kwargs": batch_of_loss}
    inputs = (order(batch["ids"]),) if 0 in modules else ()
    for _ in range(2):  # the first also finds out shapes
        for module in modules.values():
            module.zero_grad()
        hidden = schedule.step(*inputs, **given)
    grads = {index: {key: p.grad for key, p in module.named_parameters()} for index, module in modules.items()}
    return grads, [x.detach() for x in losses], hidden


def _interleaved(x):
    return interleave(x, CHUNKS)


def _as_it_is(x):
    return x


def _batch():
    labels = torch.randint(0, V, (2 * PAIRS, T))
    labels[torch.rand(2 * PAIRS, T) < 0.3] = -100
    labels[1], labels[PAIRS + 2] = -100, -100  # a chosen and a rejected sequence without completion tokens
    return {"ids": torch.randint(0, V, (2 * PAIRS, T)), "labels": labels, "ref_logps": -10 - torch.rand(2 * PAIRS)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_interleaved_rows_trains_as_one_process_does(name, ranks, monkeypatch):
    stages, batch = _model(2 * len(SCHEDULES[name][0])), _batch()
    results = ranks(2)(_trained, name, stages, batch, _interleaved)

    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    expected = nn.ModuleList(copy.deepcopy(stages)).double()
    hidden = nn.Sequential(*expected)(batch["ids"])
    loss = _loss_of(expected[-1].head)(hidden, batch["labels"], batch["ref_logps"].double())
    loss.backward()
    grads = {index: found for of_rank, _, _ in results for index, found in of_rank.items()}
    assert sorted(grads) == list(range(len(stages)))
    for index, found in grads.items():
        for key, p in expected[index].named_parameters():
            assert relative_error(found[key], p.grad) < 2e-6, (index, key)
    of_last = next(result for result in results if result[1])
    assert relative_error(torch.stack(of_last[1]).mean(), loss.detach()) < 2e-6
    assert relative_error(restore(of_last[2], CHUNKS), hidden.detach()) < 2e-6


def test_torchs_own_cut_of_chosen_then_rejected_rows_raises():
    group = Ranks(2, timeout=5.0)  # the rank without the loss waits for it
    try:
        errors = group.errors(_trained, "Schedule1F1B", _model(2), _batch(), _as_it_is)
    finally:
        group.stop()
    kinds = [error.kind for error in errors]
    assert "ValueError" in kinds
    assert "it has the rows [0, 1, 2, 3] of 12" in str(errors[kinds.index("ValueError")])
