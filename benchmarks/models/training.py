"""Does routing change what is learnt? One model, DPO-trained with four ways to the gradient of the head.

python -m benchmarks.models.training --output benchmarks/results/2026-11-training.json [--steps 300 --seeds 3]

    exact      fp32 logits, the exact gradient: what every other path approximates
    routed     fastdpo's default
    dropped    the same blocks, those lighter than tau dropped instead of sampled (Cut Cross-Entropy drops tiles of 128
               tokens by 128 columns whose gradient is all below 2^-12: a coarser unit, the same bias)
    trl bf16   TRL's ChunkedLogProbFunction, its logits rounded to bf16 as on bf16 weights

A small Llama is first trained on synthetic text with a known next-token distribution, until its head is peaked, then
DPO-trained from the same weights. Chosen and rejected completions are drawn from the text's own distribution, chosen
ones with more of one half of the vocabulary, rejected ones with less. Seeds change the pairs and their order. Runs are
kept in the output as they finish: a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastdpo
from benchmarks import inputs
from fastdpo.head import DEFAULT_TAU
from fastdpo.routing import BLOCK

VOCAB, HIDDEN, LAYERS, LENGTH, PROMPT = 8192, 128, 2, 64, 16
PAIRS, BETA, RATE, LIKED = 8, 0.1, 3e-4, 1.2
PATHS = ("exact", "routed", "dropped", "trl bf16")
RECORDED = ("loss", "margin", "accuracy", "entropy", "distance")


class Text:
    """Markov text: a token has a dozen successors with geometrically falling probabilities, Zipf-weighted ones."""

    def __init__(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        zipf = 1.0 / torch.arange(1, VOCAB + 1).float()
        self.successors = torch.multinomial(zipf, VOCAB * 12, True, generator=g).view(VOCAB, 12)
        self.weights = 0.6 ** torch.arange(12).float()

    def draw(self, count: int, g: torch.Generator, preference: Tensor | None = None, start: Tensor | None = None):
        """[count, LENGTH]; `preference` [VOCAB] multiplies a successor's probability after the prompt."""
        tokens = torch.randint(VOCAB, (count, LENGTH), generator=g)
        if start is not None:
            tokens[:, :PROMPT] = start
        for t in range(1 if start is None else PROMPT, LENGTH):
            options = self.successors[tokens[:, t - 1]]
            p = self.weights.expand(count, -1)
            if preference is not None and t >= PROMPT:
                p = p * preference[options]
            tokens[:, t] = options.gather(1, torch.multinomial(p, 1, generator=g))[:, 0]
        return tokens

    def pairs(self, count: int, g: torch.Generator) -> Tensor:
        """[2 * count, LENGTH], chosen first; both sides share their prompts."""
        liked = torch.ones(VOCAB)
        liked[::2] = LIKED
        prompts = self.draw(count, g)[:, :PROMPT]
        return torch.cat([self.draw(count, g, liked, prompts), self.draw(count, g, 1 / liked, prompts)])


def pretrained(text: Text, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        tokens = text.draw(48, g)
        hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
        loss = -fastdpo.linear_logps(hidden, model.lm_head.weight, tokens[:, 1:]).mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"pretraining {step + 1}/{steps}: {loss.item():.3f} nats", flush=True)
    return model


class _Dropped(torch.autograd.Function):
    """Log-probs whose backward leaves out (token, block) pairs lighter than tau, but for the label's."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        logps = (hidden @ weight.T).log_softmax(-1)
        ctx.save_for_backward(hidden, weight, labels, logps)
        return logps.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx, coef):
        hidden, weight, labels, logps = ctx.saved_tensors
        p = logps.exp()
        dz = -coef[:, None] * p
        dz[torch.arange(len(labels)), labels] += coef
        share, own = inputs.shares(hidden, weight, labels)
        dz = torch.where(((share >= DEFAULT_TAU) | own).repeat_interleave(BLOCK, 1), dz, 0.0)
        return dz @ weight, dz.T @ hidden, None


def trl_bf16(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    low = hidden.bfloat16(), weight.bfloat16()
    return ChunkedLogProbFunction.apply(*low, None, labels, 1.0, 32768, None, 1.0, ())[0].float()


def token_logps(path: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if path == "dropped":
        return _Dropped.apply(hidden, weight, labels)
    if path == "trl bf16":
        return trl_bf16(hidden, weight, labels)
    return fastdpo.linear_logps(hidden, weight, labels, backward=path)


def run(start: LlamaForCausalLM, text: Text, path: str, seed: int, steps: int, exact: list[Tensor] | None) -> tuple:
    """(record, parameters at the end); `exact`: parameters of the exact run of this seed, to measure distance to."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    g = torch.Generator().manual_seed(1000 + seed)
    torch.manual_seed(seed)  # the key of routed draws
    record = {"path": path, "seed": seed, **{name: [] for name in RECORDED[:4]}}
    for _ in range(steps):
        tokens = text.pairs(PAIRS, g)
        labels = tokens[:, PROMPT:]

        def sequence_logps(model, how, tokens=tokens, labels=labels):
            hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state[:, PROMPT - 1 :]
            flat = hidden.flatten(0, 1), model.lm_head.weight, labels.flatten()
            return token_logps(how, *flat).view(labels.shape), flat

        with torch.no_grad():
            ref, _ = sequence_logps(start, "exact")
        logps, flat = sequence_logps(model, path)
        out = fastdpo.preference_loss(*logps.sum(1).chunk(2), *ref.sum(1).chunk(2), beta=BETA)
        out.loss.backward()
        optimizer.step(), optimizer.zero_grad()
        with torch.no_grad():
            margin = out.chosen_rewards - out.rejected_rewards
            entropy = fastdpo.linear_token_stats(*flat, stats=("entropy",)).entropy.mean()
        values = (out.loss, margin.mean(), (margin > 0).float().mean(), entropy)
        for name, value in zip(RECORDED, values):
            record[name].append(round(value.item(), 6))
    final = [p.detach().clone() for p in model.parameters()]
    travelled = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(final, start.parameters())))
    record["travelled"] = travelled
    if exact is not None:
        record["distance"] = math.sqrt(sum((p - q).square().sum().item() for p, q in zip(final, exact)))
    return record, final


def ends(record: dict, name: str, last: int = 50) -> float:
    return sum(record[name][-last:]) / last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=800, help="steps on the synthetic text")
    args = parser.parse_args()
    setting = {
        "steps": args.steps, "pretraining": args.pretraining, "V": VOCAB, "H": HIDDEN, "layers": LAYERS, "pairs": PAIRS,
        "completion tokens": LENGTH - PROMPT, "beta": BETA, "learning rate": RATE, "liked": LIKED,
        "tau": DEFAULT_TAU,
    }  # fmt: skip
    document = {"title": "DPO with four gradients of the head", "notes": setting, "environment": inputs.environment()}
    document["runs"] = []
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["notes"] != setting:
            raise SystemExit(f"{args.output} holds another setting: {before['notes']}")
        document["runs"] = before["runs"]
    text = Text()
    kept = args.output.with_suffix(".pretrained.pt")
    if kept.exists():
        start = torch.load(kept, weights_only=False)
    else:
        start = pretrained(text, args.pretraining)
        torch.save(start, kept)
    for seed in range(args.seeds):
        exact = None
        for path in PATHS:
            done = any(r["path"] == path and r["seed"] == seed for r in document["runs"])
            if done and path != "exact":
                continue
            if path == "exact" and all(
                any(r["path"] == p and r["seed"] == seed for r in document["runs"]) for p in PATHS
            ):
                break
            record, final = run(start, text, path, seed, args.steps, exact)
            if path == "exact":
                exact = final
            if not done:
                document["runs"].append(record)
                args.output.write_text(json.dumps(document) + "\n")
            figures = ", ".join(f"{name} {ends(record, name):.4f}" for name in RECORDED[:4])
            print(f"{path}, seed {seed}: {figures}, distance {record.get('distance', 0.0):.3f}", flush=True)
    for path in PATHS:
        runs = [r for r in document["runs"] if r["path"] == path]
        cells = [f"{sum(ends(r, name) for r in runs) / len(runs):10.4f}" for name in RECORDED[:4]]
        print(f"{path:10}", *cells, f"{sum(r.get('distance', 0.0) for r in runs) / len(runs):10.3f}")


if __name__ == "__main__":
    main()
