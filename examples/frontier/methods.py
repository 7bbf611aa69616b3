"""The four ways to train on preferences, each a loop around fastdpo's calls. No logits of a text exist in any of them.

    supervised fine-tuning    linear_logps on text; LinearDPOLoss(loss_type="sft") on the preferred completions
    reward model              preference_loss(scores of the preferred, of the others, beta=1.0), Bradley and Terry's
    RL with a KL penalty      linear_divergence: log-probs and KL to the reference, both with a gradient, in one call
    DPO                       LinearDPOLoss(beta=...)

Every method starts from the reference and takes Adam with the same schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastdpo

from .model import LanguageModel, RewardModel
from .task import LENGTH, PROMPT, VOCAB, Preferences, Task

CLIP = 0.2  # PPO's


class Trainer:
    """Adam with a warm-up of a tenth of the steps, then a linear fall to a tenth of the rate."""

    def __init__(self, module: nn.Module, rate: float, steps: int):
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        warm = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm, 1.0 - 0.9 * (step - warm) / max(1, steps - warm))
        )

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def completion(model: LanguageModel, words: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden [B, LENGTH, H], labels [B, LENGTH]) of the completions of texts: aligned, without their prompts."""
    return model.hidden(words[:, :-1])[:, PROMPT - 1 :], words[:, PROMPT:]


@torch.no_grad()
def sequence_logps(model: LanguageModel, words: Tensor) -> Tensor:
    hidden, labels = completion(model, words)
    return fastdpo.linear_logps(hidden, model.head.weight, labels).sum(1)


def batches(count: int, size: int, g: torch.Generator) -> Iterator[Tensor]:
    """Indices without end; every epoch in an order of its own."""
    while True:
        yield from torch.randperm(count, generator=g)[: count - count % size].split(size)


def supervised(task: Task, steps: int, batch: int, rate: float, seed: int) -> tuple[LanguageModel, list[float]]:
    """The reference, trained on the language's own text; the loss of every step, nats per word."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model, losses = LanguageModel(VOCAB, PROMPT + LENGTH), []
    trainer = Trainer(model, rate, steps)
    for _ in range(steps):
        words = task.text(batch, g)
        loss = -fastdpo.linear_logps(model.hidden(words[:, :-1]), model.head.weight, words[:, 1:]).mean()
        trainer.step(loss)
        losses.append(loss.item())
    return model.requires_grad_(False).eval(), losses


def copy_of(reference: LanguageModel) -> LanguageModel:
    return copy.deepcopy(reference).requires_grad_(True)


def on_preferences(
    reference: LanguageModel, pairs: Preferences, loss_fn: fastdpo.LinearDPOLoss, steps, batch, rate, seed, watch
) -> LanguageModel:
    """DPO, or supervised fine-tuning on what was preferred: they differ in `loss_fn`. watch(step, policy) looks on."""
    torch.manual_seed(seed)
    policy, g = copy_of(reference), torch.Generator().manual_seed(seed)
    everything = torch.arange(len(pairs))
    ref_logps = sequence_logps(reference, pairs.rows(everything)).view(2, -1)
    trainer = Trainer(policy, rate, steps)
    for step, index in zip(range(1, steps + 1), batches(len(pairs), batch, g)):
        hidden, labels = completion(policy, pairs.rows(index))
        given = {} if loss_fn.given["loss_type"] == "sft" else {"ref_logps": ref_logps[:, index].flatten()}
        trainer.step(loss_fn(hidden, policy.head.weight, labels, **given).loss)
        watch(step, policy)
    return policy


def reward_model(
    reference: LanguageModel, pairs: Preferences, held_out: Preferences, steps, batch, rate, seed, looks: int = 8
) -> tuple[RewardModel, dict]:
    """Bradley and Terry's, as it was when its loss on held-out preferences was least; what it scored there."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = RewardModel(copy_of(reference), PROMPT)
    trainer, best, kept = Trainer(model, rate, steps), {"loss": float("inf")}, None
    for step, index in zip(range(1, steps + 1), batches(len(pairs), batch, g)):
        chosen, rejected = model(pairs.rows(index)).chunk(2)
        trainer.step(fastdpo.preference_loss(chosen, rejected, beta=1.0).loss)
        if step % max(1, steps // looks) == 0:
            with torch.no_grad():
                chosen, rejected = model(held_out.rows(torch.arange(len(held_out)))).chunk(2)
                loss = fastdpo.preference_loss(chosen, rejected, beta=1.0).loss.item()
            if loss < best["loss"]:
                best = {"loss": loss, "accuracy": (chosen > rejected).float().mean().item(), "step": step}
                kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model.requires_grad_(False).eval(), best


def what_follows(scores: Tensor, kl: Tensor, beta: float) -> Tensor:
    """[N, T]: a completion's reward minus beta times the KL of the words after each, of scores [N] and kl [N, T]."""
    return scores[:, None] - beta * (kl.flip(1).cumsum(1).flip(1) - kl)


def against_others(value: Tensor, group: int) -> Tensor:
    """`value` less the mean of the group's others at the same place: RLOO's baseline."""
    value = value.view(-1, group, value.shape[1])
    return ((value - value.mean(1, keepdim=True)) * (group / (group - 1))).flatten(0, 1)


def clipped_loss(logps: Tensor, old: Tensor, kl: Tensor, advantage: Tensor, beta: float) -> Tensor:
    """[N]: PPO's clipped loss, and the KL of each word's distribution. At `old` its gradient is the objective's."""
    ratio = (logps - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return (beta * kl - gain).sum(1)


def reinforced(
    reference: LanguageModel,
    reward: Callable[[Tensor], Tensor],
    prompts: Callable[[int, torch.Generator], Tensor],
    *,
    beta: float,
    steps: int,
    batch: int,
    group: int,
    epochs: int,
    rate: float,
    seed: int,
    watch,
) -> LanguageModel:
    """max E[reward - beta * KL(policy || reference)]: PPO's clipped steps on samples whose baseline is that of RLOO.

    Every step draws `group` completions of each prompt. The KL is no sampled log-ratio: a word's own is differentiated,
    that of the words after it stands in its advantage, and both are exact. That is the objective's gradient too, with
    less variance. `batch` completions a step, used `epochs` times.
    """
    torch.manual_seed(seed)
    policy, g = copy_of(reference), torch.Generator().manual_seed(seed)
    trainer = Trainer(policy, rate, steps * epochs)
    for step in range(1, steps + 1):
        words = policy.sample(prompts(batch // group, g).repeat_interleave(group, 0), LENGTH, g)
        with torch.no_grad():
            ref_hidden, _ = completion(reference, words)
            scores = reward(words)
        old = advantage = None
        for _ in range(epochs):
            hidden, labels = completion(policy, words)
            head, ref_head = policy.head.weight, reference.head.weight
            out = fastdpo.linear_divergence(
                hidden, head, ref_hidden, ref_head, labels, kind="reverse_kl", stats=("logps",)
            )
            if old is None:
                old, value = out.logps.detach(), what_follows(scores, out.divergence.detach(), beta)
                advantage = against_others(value, group)
            trainer.step(clipped_loss(out.logps, old, out.divergence, advantage, beta).mean())
        watch(step, policy)
    return policy
