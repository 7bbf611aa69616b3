"""A preference task whose reward is known: text of 512 words drawn from a chain, and how much a reader likes it.

A text's reward adds up the valence of its words. A negation turns the next word's around, and a word said before does
not count again. A reader compares two texts by Bradley and Terry's model: P(a preferred to b) = sigmoid(r(a) - r(b)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB, PROMPT, LENGTH = 512, 4, 12  # words, words of a prompt, words of a completion
SUCCESSORS, FALL = 12, 0.75  # a word is followed by one of so many, with geometrically falling probability
LOADED, NEGATIONS, SCALE = 0.4, 0.06, 0.65  # shares of words with a valence and of negations; a valence's deviation


class Task:
    """The language and its reward. Every seed is a language of its own."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        frequency = torch.arange(1, VOCAB + 1).float() ** -0.7
        self.successors = torch.multinomial(frequency, VOCAB * SUCCESSORS, True, generator=g).view(VOCAB, SUCCESSORS)
        self.weights = FALL ** torch.arange(SUCCESSORS).float()
        loaded = torch.rand(VOCAB, generator=g) < LOADED
        self.negates = torch.rand(VOCAB, generator=g) < NEGATIONS
        valence = SCALE * torch.randn(VOCAB, generator=g)
        self.valence = valence.where(loaded & ~self.negates, torch.zeros(()))

    def text(self, count: int, g: torch.Generator) -> Tensor:
        """[count, PROMPT + LENGTH] words."""
        words = torch.randint(VOCAB, (count, PROMPT + LENGTH), generator=g)
        for t in range(1, words.shape[1]):
            chosen = torch.multinomial(self.weights.expand(count, -1), 1, generator=g)
            words[:, t] = self.successors[words[:, t - 1]].gather(1, chosen)[:, 0]
        return words

    def prompts(self, count: int, g: torch.Generator) -> Tensor:
        return self.text(count, g)[:, :PROMPT]

    def reward(self, words: Tensor) -> Tensor:
        """[N] of texts [N, PROMPT + LENGTH]: what their completions are worth."""
        said = words[:, PROMPT:]
        sign = 1.0 - 2.0 * self.negates[words[:, PROMPT - 1 : -1]]
        again = (said[:, :, None] == said[:, None, :]).tril(-1).any(2)
        return (self.valence[said] * sign).masked_fill(again, 0.0).sum(1)


@dataclass
class Preferences:
    """Texts of the same prompts, [B, PROMPT + LENGTH]."""

    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, index: Tensor) -> Tensor:
        """[2B, ...]: the chosen texts first, the rejected ones after them."""
        return torch.cat([self.chosen[index], self.rejected[index]])

    def split(self, held_out: int) -> tuple[Preferences, Preferences]:
        parts = (slice(None, -held_out), slice(-held_out, None))
        return tuple(Preferences(self.chosen[part], self.rejected[part]) for part in parts)


def preferences(task: Task, first: Tensor, second: Tensor, g: torch.Generator) -> Preferences:
    """What the reader says about two texts of each prompt: one draw per comparison, so it errs where they are close."""
    first_wins = torch.rand(len(first), generator=g) < (task.reward(first) - task.reward(second)).sigmoid()
    wins = first_wins[:, None]
    return Preferences(first.where(wins, second), second.where(wins, first))
