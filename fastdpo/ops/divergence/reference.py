"""The divergence in plain torch, fp64 when the inputs are: the oracle of the other engines, and the fallback where none
of them can run. Both heads' logits exist for a few tokens at a time, and every statistic is taken as it is defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...head import Routing
from ...routing import BLOCK, num_blocks, route, set_bytes
from ..problem import Gradients, Needs, Tokens
from ..reference import HeadSums, accumulate_dtype, chunks, logits_of, operand, routed, rows_of, without_label
from .problem import EPS, DivergenceForward, DivergenceUpstream, Heads


class _Chunk(NamedTuple):
    """Some tokens' two distributions, as logarithms without the label's id and as its own."""

    hidden: Tensor  # [n, H] of the student
    slope: Tensor | float  # dz / d(product)
    z: Tensor  # [n, V]
    log_p: Tensor  # [n, V], -inf at the label
    log_r: Tensor
    logps: Tensor  # [n] of the label; -inf where there is none
    ref_logps: Tensor
    lse: Tensor
    ref_lse: Tensor


def _chunks(heads: Heads, tokens: Tokens, ref_tokens: Tokens, shards=None) -> Iterator[tuple[slice, _Chunk]]:
    student, teacher = heads.student, heads.teacher
    dtype = torch.promote_types(accumulate_dtype(student), accumulate_dtype(teacher))
    columns = 2 * student.weight.shape[0] if shards is None else 2 * shards.widest
    for chunk in chunks(tokens, columns):
        labels = tokens.labels[chunk]
        hidden = operand(student.hidden[rows_of(tokens.source_rows, chunk)], student)
        z, slope = logits_of(student, hidden)
        w, _ = logits_of(teacher, operand(teacher.hidden[rows_of(ref_tokens.source_rows, chunk)], teacher))
        z, w = z.to(dtype), w.to(dtype)
        of_heads = []
        for x in (z, w):
            rest, label_logit = without_label(x, labels)
            rest_lse = rest.logsumexp(1)
            if shards is not None:
                label_logit, rest_lse = shards.label_logit(label_logit), shards.logsumexp(rest_lse)
            logp = -torch.nn.functional.softplus(rest_lse - label_logit, threshold=60)
            lse = torch.logaddexp(rest_lse, label_logit)
            of_heads.append((rest - lse[:, None], logp, lse))
        (log_p, logps, lse), (log_r, ref_logps, ref_lse) = of_heads
        yield chunk, _Chunk(hidden, slope, z, log_p, log_r, logps, ref_logps, lse, ref_lse)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x, where nothing has no part in it."""
    return torch.where(p == 0, torch.zeros_like(p), p * x)


def _log_mixture(log_p: Tensor, log_r: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(1 - beta), log_r + math.log(beta))


def _terms(heads: Heads, log_p: Tensor, log_r: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of every id: (what sums up to the divergence, what sums up to the mean under p that dz subtracts)."""
    p, r = log_p.exp(), log_r.exp()
    if heads.kind == "forward_kl":
        return _times(r, log_r - log_p), None
    if heads.kind == "reverse_kl":
        terms = _times(p, log_p - log_r)
        return terms, terms
    log_m = _log_mixture(log_p, log_r, heads.beta)
    of_p, of_r = _times(p, log_p - log_m), _times(r, log_r - log_m)
    return heads.beta * of_r + (1 - heads.beta) * of_p, of_p


def _unscaled_dz(heads: Heads, log_p: Tensor, log_r: Tensor, mean: Tensor | None) -> Tensor:
    """dD/dz, of ids whose logarithms are given; `mean` like one of them."""
    p = log_p.exp()
    if heads.kind == "forward_kl":
        return p - log_r.exp()
    if heads.kind == "reverse_kl":
        return _times(p, log_p - log_r - mean)
    return (1 - heads.beta) * _times(p, log_p - _log_mixture(log_p, log_r, heads.beta) - mean)


def _bounds(heads: Heads, log_p: Tensor, log_r: Tensor, mean: Tensor | None) -> Tensor:
    """[n, blocks]: what sum of |dz| a block has at most, by problem.py."""

    def of_blocks(x: Tensor) -> Tensor:
        return pad(x, (0, -x.shape[1] % BLOCK)).view(x.shape[0], -1, BLOCK).sum(2)

    p, r = log_p.exp(), log_r.exp()
    mass = of_blocks(p)
    if heads.kind == "forward_kl":
        x = log_p - log_r
        mass = mass + of_blocks(r)
        squares = of_blocks(_times(p, x * x) + _times(r, x * x)) + EPS**2 * mass
        return torch.minimum(mass, (mass * squares).sqrt() / 2)
    x = log_p - (log_r if heads.kind == "reverse_kl" else _log_mixture(log_p, log_r, heads.beta)) - mean[:, None]
    return (mass * (of_blocks(_times(p, x * x)) + EPS**2 * mass)).sqrt()


def _share(heads: Heads, part: _Chunk, mean: Tensor | None, total: Tensor) -> Tensor:
    """[n, blocks] fp32: what routing.py calls a block's share."""
    share = _bounds(heads, part.log_p, part.log_r, mean) / total[:, None]
    share = torch.where(total[:, None] == 0, torch.zeros_like(share), share)
    if heads.routes_logps:
        blocks = pad(part.log_p, (0, -part.log_p.shape[1] % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
        rest = (-torch.expm1(part.logps)).log()
        share = torch.maximum(share, (blocks.logsumexp(2) - rest[:, None]).exp())
    return share.float()


def forward(
    heads: Heads,
    tokens: Tokens,
    ref_tokens: Tokens,
    *,
    stats: frozenset[str] = frozenset(),
    routing: Routing | None = None,
    shards=None,
) -> DivergenceForward:
    total = (lambda x: x) if shards is None else shards.sum
    columns: dict[str, list[Tensor]] = {}
    for chunk, part in _chunks(heads, tokens, ref_tokens, shards):
        found = {"lse": part.lse, "ref_lse": part.ref_lse}
        if heads.labelled:
            found |= {"logps": part.logps, "ref_logps": part.ref_logps}
        of_rest, of_label = (_terms(heads, x, y) for x, y in _pairs(part))
        found["divergence"], mean = (
            None if rest is None else total(rest.sum(1)) + label for rest, label in zip(of_rest, of_label)
        )
        if mean is not None:
            found["mean"] = mean
        if "entropy" in stats:
            rest = total(_times(part.log_p.exp(), part.log_p).sum(1))
            found["entropy"] = -(rest + _times(part.logps.exp(), part.logps))
        if routing is not None:
            found["total"] = total(_bounds(heads, part.log_p, part.log_r, mean).sum(1))
            share = _share(heads, part, mean, found["total"])
            token_ids = torch.arange(chunk.start, chunk.stop, device=share.device)
            labels = tokens.labels[chunk]
            found["bitmap"], found["most_pairs"] = route(
                share, labels, routing.taus, int(routing.seed), token_ids, shards
            )
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    if not columns:
        return _empty(heads, stats, routing)
    return DivergenceForward(**{"mean": None, **{name: torch.cat(values) for name, values in columns.items()}})


def _pairs(part: _Chunk):
    return (part.log_p, part.log_r), (part.logps, part.ref_logps)


def _empty(heads: Heads, stats: frozenset[str], routing: Routing | None) -> DivergenceForward:
    """Of no completion token."""
    dtype = torch.promote_types(accumulate_dtype(heads.student), accumulate_dtype(heads.teacher))
    none = torch.empty(0, dtype=dtype, device=heads.student.hidden.device)
    names = {"divergence", "lse", "ref_lse", *(stats & {"entropy"})}
    names |= {"logps", "ref_logps"} if heads.labelled else set()
    names |= set() if heads.kind == "forward_kl" else {"mean"}
    found = {field.name: none if field.name in names else None for field in fields(DivergenceForward)}
    if routing is not None:
        width = len(routing.taus) * set_bytes(num_blocks(heads.student.weight.shape[0]))
        found["bitmap"] = none.new_empty(0, width, dtype=torch.uint8)
        found |= {"total": none, "most_pairs": none.int()}
    return DivergenceForward(**found)


def backward(
    heads: Heads,
    tokens: Tokens,
    ref_tokens: Tokens,
    saved: DivergenceForward,
    upstream: DivergenceUpstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    out = HeadSums(heads.student, tokens, needs)
    for chunk, part in _chunks(heads, tokens, ref_tokens):
        labels = tokens.labels[chunk]
        mean = None if saved.mean is None else saved.mean[chunk]
        # of a shard: those of the whole vocabulary
        lse, ref_lse = saved.lse[chunk], saved.ref_lse[chunk]
        part = part._replace(
            log_p=part.log_p + (part.lse - lse)[:, None], log_r=part.log_r + (part.ref_lse - ref_lse)[:, None]
        )
        if heads.labelled:
            part = part._replace(logps=saved.logps[chunk], ref_logps=saved.ref_logps[chunk])
        g, c = (x[chunk].to(part.z.dtype) for x in (upstream.coef_divergence, upstream.coef))
        p = part.log_p.exp()
        none = torch.zeros_like(p)

        def given(coef: Tensor, dz: Tensor, none=none) -> Tensor:
            coef = coef.unsqueeze(-1) if dz.ndim == 2 else coef
            return torch.where(coef == 0, none if dz.ndim == 2 else none[:, 0], coef * dz)

        of_rest, of_label = (
            _unscaled_dz(heads, x, y, None if mean is None else mean.view(-1, *[1] * (x.ndim - 1)))
            for x, y in _pairs(part)
        )
        if heads.kind == "forward_kl":  # 1 - p and 1 - r have the digits that p and r of a sure label lack
            of_label = torch.expm1(part.logps) - torch.expm1(part.ref_logps)
        dz = given(g, of_rest) + given(c, -p)
        label_dz = given(g, of_label) + given(c, -torch.expm1(part.logps))
        if upstream.coef_entropy is not None:
            e, entropy = upstream.coef_entropy[chunk].to(part.z.dtype), saved.entropy[chunk]
            dz -= given(e, _times(p, part.log_p + entropy[:, None]))
            label_dz -= given(e, _times(part.logps.exp(), part.logps + entropy))
        here = (labels >= 0) & (labels < dz.shape[1])
        index = labels.clamp(0, dz.shape[1] - 1)[:, None]
        dz.scatter_(1, index, torch.where(here, label_dz, dz.gather(1, index)[:, 0])[:, None])
        dz *= part.slope
        dz_hidden = dz_weight = dz
        if routing is not None:
            share = _share(heads, part, mean, saved.total[chunk])
            dz_hidden, dz_weight = routed(dz, share, saved.bitmap[chunk], labels, routing)
        out.add(chunk, part.hidden, dz_hidden, dz_weight)
    return out.gradients(sums)
