"""Which blocks to sample: the routed backward's rule beside the alternatives to it, on a trained head, against fp64.

python -m benchmarks.cpu.rules --head head.safetensors [--draws 20]

systematic          one draw per token over the running sum of q, what fastdpo does (fastdpo/routing.py)
one draw per unit   a fresh draw for every whole number of the running sum; a block at a border may be drawn twice
independent         one draw per pair
probability         a block's probability against tau instead of its share of the tail, independent draws

Errors: rms over the draws, relative to the exact gradient: of dhidden overall, of the rows of tokens with p > 0.99, of
the worst token; of dweight. `alternating` is systematic sampling's worst case: equal shares of tau / 2 whose directions
alternate, relative to the length of a direction.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import inputs
from fastdpo.routing import BLOCK, ONE, keep, odds, own_block, pair_weights, philox, second_odds

TAUS = tuple(2.0**-k for k in (6, 7, 8, 9, 10, 11))
PAIRS = ((2.0**-8, 2.0**-10), (2.0**-9, 2.0**-11))


class Tail(NamedTuple):
    """Of some tokens, fp64."""

    hidden: Tensor  # [N, H]
    labels: Tensor  # [N]
    p: Tensor  # [N, V], the label's left out
    q_label: Tensor  # [N] 1 - p(label)
    share: Tensor  # [N, K]
    own: Tensor  # [N, K] bool


def tails(head: inputs.HeadInputs, count: int, size: int = 256) -> Iterator[Tail]:
    weight = head.weight.double()
    rows = torch.linspace(0, len(head.labels) - 1, count).long()
    for chunk in rows.split(size):
        hidden, labels = head.hidden[chunk].double(), head.labels[chunk]
        z = hidden @ weight.T
        rest = z.scatter(1, labels[:, None], -torch.inf)
        rest_lse = rest.logsumexp(1)
        q_label = torch.sigmoid(rest_lse - z.gather(1, labels[:, None])[:, 0])
        tail = (rest - rest_lse[:, None]).exp()
        share = tail.view(len(chunk), -1, BLOCK).sum(2)
        yield Tail(hidden, labels, tail * q_label[:, None], q_label, share, own_block(labels, share.shape[1]))


def systematic(q: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """[N, K] how often a block is taken, of q in units of 1 / ONE."""
    return keep(q, philox(seed, tokens)[:, 0]).double()


def one_per_unit(q: Tensor, tokens: Tensor, seed: int) -> Tensor:
    sure, light = q == ONE, (q % ONE).double() / ONE
    after = light.cumsum(1)
    units = torch.rand(len(q), int(after[:, -1].max()) + 2, generator=torch.Generator().manual_seed(seed))

    def points_below(x: Tensor) -> Tensor:
        unit = x.floor()
        return unit + (units.double().gather(1, unit.long()) < x - unit)

    before = torch.nn.functional.pad(after, (1, -1))
    return torch.where(sure, 1.0, points_below(after) - points_below(before))


def independent(q: Tensor, tokens: Tensor, seed: int) -> Tensor:
    draws = torch.rand(q.shape, generator=torch.Generator().manual_seed(seed))
    return (draws.double() < q.double() / ONE).double()


RULES: dict[str, Callable] = {"systematic": systematic, "one draw per unit": one_per_unit, "independent": independent}


def weighted(rule: Callable, q: Tensor, tokens: Tensor, seed: int) -> Tensor:
    taken = rule(q, tokens, seed)
    return torch.where(taken > 0, taken * pair_weights(q).double(), 0.0)


def measure(head: inputs.HeadInputs, count: int, draws: int, weights_of: Callable) -> dict[str, float]:
    """`weights_of(tail, tokens, seed) -> (weights [N, K] for dhidden, for dweight)`"""
    weight = head.weight.double()
    blocks = weight.view(-1, BLOCK, weight.shape[1])
    coef = torch.where(torch.arange(count) < count // 2, 1.0, -1.0).double()
    squares, norms, sure, pairs = [], [], [], 0.0
    exact_dweight, off = torch.zeros_like(weight), torch.zeros(draws, *weight.shape)
    first = 0
    for tail in tails(head, count):
        n = len(tail.labels)
        tokens, c = torch.arange(first, first + n), coef[first : first + n]
        p = tail.p.view(n, -1, BLOCK)
        part = torch.einsum("nkb,kbh->nkh", p, blocks)  # what a block takes from the token's gradient
        norms.append((tail.q_label[:, None] * weight[tail.labels] - part.sum(1)).square().sum(1))
        sure.append(tail.q_label < 0.01)
        exact_dweight -= (c[:, None] * tail.p).T @ tail.hidden
        exact_dweight.index_add_(0, tail.labels, (c * tail.q_label)[:, None] * tail.hidden)
        square = torch.zeros(n, dtype=torch.float64)
        for seed in range(draws):
            of_hidden, of_weight = weights_of(tail, tokens, seed)
            pairs += (of_weight > 0).sum().item() / draws / count
            square += torch.einsum("nk,nkh->nh", of_hidden - 1, part).square().sum(1) / draws
            noise = (p * (c[:, None] * (of_weight - 1))[:, :, None]).flatten(1)
            off[seed] += noise.float().T @ tail.hidden.float()
        squares.append(square)
        first += n
    square, norm, sure = torch.cat(squares), torch.cat(norms), torch.cat(sure)
    return {
        "pairs per token": pairs,
        "dhidden": (square.sum() / norm.sum()).sqrt().item(),
        "p > 0.99": (square[sure].sum() / norm[sure].sum()).sqrt().item(),
        "worst token": (square / norm).sqrt().max().item(),
        "dweight": (off.square().sum((1, 2)).mean().sqrt() / exact_dweight.norm()).item(),
    }


def alternating(rule: Callable, tau: float, draws: int) -> float:
    count = round(2 / tau)
    q = torch.full((draws, count), ONE // 2)
    taken = torch.cat([rule(q[i : i + 1], torch.tensor([i]), i) for i in range(draws)]) * tau
    directions = torch.tensor([1.0, -1.0]).double().repeat(count // 2)
    return (taken @ directions).square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    head = inputs.load(args.head)
    rows = []

    def add(name: str, tau: str, weights_of: Callable, worst: float | None = None) -> None:
        rows.append({"rule": name, "tau": tau, **measure(head, args.tokens, args.draws, weights_of)})
        rows[-1]["alternating"] = worst
        print(rows[-1], flush=True)

    for tau in TAUS:
        for name, rule in RULES.items():

            def one(tail, tokens, seed, tau=tau, rule=rule):
                return (weighted(rule, odds(tail.share, tail.own, tau), tokens, seed),) * 2

            add(name, f"2^{round(torch.tensor(tau).log2().item())}", one, alternating(rule, tau, 200))

        def by_probability(tail, tokens, seed, tau=tau):
            mass = tail.share * tail.q_label[:, None]
            return (weighted(independent, odds(mass, tail.own, tau / 4), tokens, seed),) * 2

        add("probability", f"2^{round(torch.tensor(tau / 4).log2().item())}", by_probability)
    for large, small in PAIRS:
        for name, rule in (("systematic", systematic), ("independent", independent)):

            def two(tail, tokens, seed, large=large, small=small, rule=rule):
                q = odds(tail.share, tail.own, small)
                of_weight = weighted(systematic, q, tokens, seed)
                inside = second_odds(tail.share, tail.own, small, large) * (of_weight > 0)
                return of_weight * weighted(rule, inside, tokens, seed + 1000), of_weight

            taus = (round(torch.tensor(tau).log2().item()) for tau in (large, small))
            add(f"systematic, then {name} for dhidden", ", ".join(f"2^{tau}" for tau in taus), two)
    notes = {"head": head.name, "N": args.tokens, "V": head.weight.shape[0], "H": head.weight.shape[1]}
    inputs.report(args.output, "Which blocks to sample", rows, notes | {"draws": args.draws})


if __name__ == "__main__":
    main()
