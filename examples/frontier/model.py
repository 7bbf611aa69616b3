"""A transformer of a hundred thousand weights: what is fed to its head, and the head. fastdpo needs no more of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, LAYERS, HEADS = 48, 2, 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None):
        """(x, keys and values so far). With `past`, x is the one word after it."""
        q, k, v = self.qkv(self.before_attention(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x)), (k, v)


class LanguageModel(nn.Module):
    def __init__(self, vocab: int, length: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, WIDTH), nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.1)

    def _step(self, ids: Tensor, past: list | None, start: int) -> tuple[Tensor, list]:
        x = self.words(ids) + self.places.weight[start : start + ids.shape[1]]
        seen = []
        for i, layer in enumerate(self.layers):
            x, kept = layer(x, None if past is None else past[i])
            seen.append(kept)
        return self.norm(x), seen

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, T, WIDTH] of ids [B, T]."""
        return self._step(ids, None, 0)[0]

    @torch.no_grad()
    def sample(self, prompts: Tensor, count: int, g: torch.Generator) -> Tensor:
        """[B, T + count]: prompts [B, T] with `count` words after each."""
        words, past, new = prompts, None, prompts
        for _ in range(count):
            hidden, seen = self._step(new, past, words.shape[1] - new.shape[1])
            past = seen
            new = torch.multinomial(self.head(hidden[:, -1]).softmax(-1), 1, generator=g)
            words = torch.cat([words, new], 1)
        return words


class RewardModel(nn.Module):
    """A score per text: a language model's body and one row of weights."""

    def __init__(self, start: LanguageModel, prompt: int):
        super().__init__()
        self.body, self.prompt = start, prompt
        self.score = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.score.weight)

    def forward(self, words: Tensor) -> Tensor:
        """[B] of texts [B, T], from the sum of their completions' hidden states."""
        return self.score(self.body.hidden(words)[:, self.prompt :].sum(1))[:, 0]
