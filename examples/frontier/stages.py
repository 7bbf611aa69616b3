"""The stages, each a job that a process of its own may run: what one leaves, the next reads from a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastdpo

from . import evaluate, methods
from .model import LanguageModel, RewardModel
from .settings import DPO, RL, SFT, Settings
from .task import LENGTH, PROMPT, VOCAB, Preferences, Task, preferences

TEST = 10_000  # seed of the prompts that policies are looked at with, which none is trained on


@dataclass(frozen=True)
class Run:
    """One policy's training."""

    method: str
    beta: float | None
    seed: int
    changes: tuple[tuple[str, float], ...] = ()  # to the method's settings, when these are being chosen


def one_thread() -> None:
    torch.set_num_threads(1)  # the same bits however many cores there are


def load_reference(folder: Path) -> LanguageModel:
    model = LanguageModel(VOCAB, PROMPT + LENGTH)
    model.load_state_dict(torch.load(folder / "reference.pt"))
    return model.requires_grad_(False).eval()


def test_prompts(task: Task, count: int) -> torch.Tensor:
    return task.prompts(count, torch.Generator().manual_seed(TEST))


def train_reference(settings: Settings, folder: Path) -> dict:
    start = time.process_time()
    task = Task()
    model, losses = methods.supervised(task, **settings.reference)
    torch.save(model.state_dict(), folder / "reference.pt")
    seconds = time.process_time() - start
    stands = evaluate.stand(model, model, task, test_prompts(task, settings.prompts), TEST)
    parameters = sum(p.numel() for p in model.parameters())
    return {"loss": sum(losses[-20:]) / len(losses[-20:]), "parameters": parameters, "cpu seconds": seconds, **stands}


def compare(settings: Settings, folder: Path, seed: int, changes: tuple[tuple[str, float], ...] = ()) -> dict:
    """One seed's preferences, between two samples of the reference each, and the reward model learned from them.

    Both are kept for `train`, but for a candidate: one with `changes` to the reward model's settings.
    """
    task, reference, g = Task(), load_reference(folder), torch.Generator().manual_seed(seed)
    count = settings.pairs + settings.held_out
    prompts = task.prompts(count, g)
    pairs = preferences(task, *(reference.sample(prompts, LENGTH, g) for _ in range(2)), g)
    train, held_out = pairs.split(settings.held_out)
    start = time.process_time()
    options = {**settings.reward_model, **dict(changes), "seed": seed}
    model, best = methods.reward_model(reference, train, held_out, **options)
    if not changes:
        kept = {"chosen": train.chosen, "rejected": train.rejected, "scores": model.state_dict()}
        torch.save(kept, folder / f"{seed}.pt")
    rewards = task.reward(pairs.chosen), task.reward(pairs.rejected)
    agree = (rewards[0] > rewards[1]).float().mean().item()
    spread = torch.cat(rewards).std().item()
    seconds = time.process_time() - start
    record = {"seed": seed, **best, "chosen is better": agree, "reward's deviation": spread, "cpu seconds": seconds}
    return record | ({"changes": dict(changes)} if changes else {})


def ceiling(settings: Settings, folder: Path) -> list[dict[str, float]]:
    task = Task()
    prompts = test_prompts(task, settings.ceiling_prompts)
    betas = [20 * 0.8**i for i in range(24)]
    return evaluate.ceiling(load_reference(folder), task, prompts, settings.ceiling_samples, betas, TEST)


def train(settings: Settings, folder: Path, run: Run) -> dict:
    """The run's points along its training; the last is where it ends."""
    task, reference = Task(), load_reference(folder)
    kept = torch.load(folder / f"{run.seed}.pt")
    pairs = Preferences(kept["chosen"], kept["rejected"])
    options = {**settings.of(run.method), **dict(run.changes), "seed": run.seed}
    prompts, points, looking = test_prompts(task, settings.prompts), [], 0.0
    every = -(-options["steps"] // settings.looks)

    def watch(step: int, policy: LanguageModel) -> None:
        nonlocal looking
        if step % every == 0 or step == options["steps"]:
            start = time.process_time()
            points.append({"step": step, **evaluate.stand(policy, reference, task, prompts, TEST)})
            looking += time.process_time() - start

    start = time.process_time()
    if run.method == SFT:
        methods.on_preferences(reference, pairs, fastdpo.LinearDPOLoss(loss_type="sft"), **options, watch=watch)
    elif run.method == DPO:
        methods.on_preferences(reference, pairs, fastdpo.LinearDPOLoss(beta=run.beta), **options, watch=watch)
    else:
        reward: Callable = task.reward
        if run.method == RL:
            scores = RewardModel(LanguageModel(VOCAB, PROMPT + LENGTH), PROMPT)
            scores.load_state_dict(kept["scores"])
            reward = scores.requires_grad_(False).eval()
        methods.reinforced(reference, reward, task.prompts, beta=run.beta, **options, watch=watch)
    seconds = time.process_time() - start - looking
    record = {"method": run.method, "beta": run.beta, "seed": run.seed, "cpu seconds": seconds, "points": points}
    return record | ({"changes": dict(run.changes)} if run.changes else {})
