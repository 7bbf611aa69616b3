"""Where a policy stands: the true reward of what it says, and how far it has gone from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdpo

from .methods import completion
from .model import LanguageModel
from .task import LENGTH, Task

TRUSTED = 64  # samples


@torch.no_grad()
def stand(policy: LanguageModel, reference: LanguageModel, task: Task, prompts: Tensor, seed: int) -> dict[str, float]:
    """Of one sampled completion per prompt: mean true reward, its standard error, and KL(policy || reference) of the
    whole completion in nats. Sampled is only the text: the KL of every word's distribution along it is exact."""
    words = policy.sample(prompts, LENGTH, torch.Generator().manual_seed(seed))
    (hidden, labels), (ref_hidden, _) = completion(policy, words), completion(reference, words)
    out = fastdpo.linear_divergence(
        hidden, policy.head.weight, ref_hidden, reference.head.weight, labels, kind="reverse_kl"
    )
    reward = task.reward(words)
    return {
        "reward": reward.mean().item(),
        "reward se": (reward.std() / len(reward) ** 0.5).item(),
        "kl": out.divergence.sum(1).mean().item(),
    }


@torch.no_grad()
def ceiling(
    reference: LanguageModel, task: Task, prompts: Tensor, samples: int, betas: list[float], seed: int
) -> list[dict[str, float]]:
    """The frontier that no policy can pass: reference * exp(reward / beta), by weighing samples of the reference.

    The gain is over the reference, on the same prompts. Left out is a beta whose weights live on fewer samples of a
    prompt than TRUSTED, in the mean over prompts.
    """
    g = torch.Generator().manual_seed(seed)
    rewards = []
    for prompt in prompts.split(1):
        rewards.append(task.reward(reference.sample(prompt.repeat_interleave(samples, 0), LENGTH, g)).view(-1, samples))
    reward, found = torch.cat(rewards).double(), []
    for beta in betas:
        weight = (reward / beta).softmax(1)
        normaliser = (reward / beta).logsumexp(1) - torch.tensor(samples).log()
        mean = (weight * reward).sum(1)
        effective = 1 / weight.square().sum(1)
        if effective.mean() >= TRUSTED:
            kl = mean / beta - normaliser
            gain = (mean - reward.mean(1)).mean().item()
            found.append({"beta": beta, "gain": gain, "kl": kl.mean().item()})
    return found


def at_equal_kl(points: list[dict], levels: list[float]) -> list[float | None]:
    """Reward between the points of one method, in order of their KL; None beyond the last.

    It is straight in the root of KL: near the reference the best gain is. Lines straight in KL would lie below a
    frontier, and the further the rarer its points.
    """
    points, found = sorted(points, key=lambda point: point["kl"]), []
    for level in levels:
        above = next((i for i, point in enumerate(points) if point["kl"] >= level), None)
        if not above:  # beyond the last, or before the first
            found.append(points[0]["reward"] if above == 0 and points[0]["kl"] == level else None)
            continue
        low, high = points[above - 1], points[above]
        part = (level**0.5 - low["kl"] ** 0.5) / (high["kl"] ** 0.5 - low["kl"] ** 0.5)
        found.append(low["reward"] + part * (high["reward"] - low["reward"]))
    return found
