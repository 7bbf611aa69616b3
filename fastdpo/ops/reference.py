"""The definition of every quantity in plain torch, fp64 when the inputs are: the oracle of the other engines, and
the fallback where none of them can run. Logits exist for a few tokens at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..head import Routing
from ..routing import BLOCK, num_blocks, odds, own_block, pair_weights, route, second_odds, set_bytes, unpack_bits
from .problem import Forward, Gradients, Head, Needs, Tokens, Upstream

LOGITS_BYTES = 32 << 20  # of one chunk's logits; a handful of such temporaries live at a time


def chunks(tokens: Tokens, columns: int):
    size = max(1, LOGITS_BYTES // (columns * 4))
    for start in range(0, len(tokens), size):
        yield slice(start, min(start + size, len(tokens)))


def rows_of(rows: Tensor | None, chunk: slice):
    return chunk if rows is None else rows[chunk]


def accumulate_dtype(head: Head) -> torch.dtype:
    return torch.float64 if head.compute_dtype == torch.float64 else torch.float32


def operand(x: Tensor, head: Head) -> Tensor:
    return x.to(head.compute_dtype).to(accumulate_dtype(head))


def logits_of(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor | float]:
    """z and dz/d(product) of some rows."""
    y = hidden @ operand(head.weight, head).T
    if head.lora is not None:
        y += head.lora.scale * (hidden @ operand(head.lora.a, head).T) @ operand(head.lora.b, head).T
    if head.bias is not None:
        y += head.bias.to(y.dtype)
    scale, softcap, temperature = head.transform
    y *= scale
    slope = scale / temperature
    if softcap:
        t = torch.tanh(y / softcap)
        y, slope = softcap * t, slope * (1 - t * t)
    return y / temperature, slope


def without_label(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(z with the label's logit set to -inf, the label's logit or -inf when it is on another shard)."""
    here = (labels >= 0) & (labels < z.shape[1])
    index = labels.clamp(0, z.shape[1] - 1)[:, None]
    label_logit = torch.where(here, z.gather(1, index)[:, 0], -torch.inf)
    rest = z.scatter(1, index, torch.where(here[:, None], -torch.inf, z.gather(1, index)))
    return rest, label_logit


def forward(
    head: Head,
    tokens: Tokens,
    *,
    stats: frozenset[str] = frozenset(),
    routing: Routing | None = None,
    shards=None,
) -> Forward:
    dtype, device = accumulate_dtype(head), head.hidden.device
    columns: dict[str, list[Tensor]] = {}

    def emit(name: str, value: Tensor) -> None:
        columns.setdefault(name, []).append(value)

    # ranks exchange a chunk at a time: as many on every one
    for chunk in chunks(tokens, head.weight.shape[0] if shards is None else shards.widest):
        z, _ = logits_of(head, operand(head.hidden[rows_of(tokens.source_rows, chunk)], head))
        labels = tokens.labels[chunk]
        rest, label_logit = without_label(z, labels)
        rest_lse = rest.logsumexp(1)
        if shards is not None:
            label_logit, rest_lse = shards.label_logit(label_logit), shards.logsumexp(rest_lse)
        # log p = -log(1 + exp(rest - label)) keeps the relative precision of log p near 0, as label - lse does not
        logps = -torch.nn.functional.softplus(rest_lse - label_logit, threshold=60)
        lse = torch.logaddexp(rest_lse, label_logit)
        emit("logps", logps)
        emit("lse", lse)
        if stats:
            total = (lambda x: x) if shards is None else shards.sum
            vocab_size = z.shape[1] if shards is None else shards.vocab_size
            logp = z - lse[:, None]
            p = logp.exp()
            if "entropy" in stats:
                emit("entropy", -total(torch.where(p > 0, p * logp, 0 * p).sum(1)))
            if "log_sum_sq_probs" in stats:
                emit("log_sum_sq_probs", total((p * p).sum(1)).log())
            if "mean_logit" in stats:
                emit("mean_logit", total(z.sum(1)) / vocab_size)
            if "is_top1" in stats:  # argmax returns the first maximum: a tie counts only when the label comes first
                before = torch.arange(z.shape[1], device=device) < labels[:, None]
                side = torch.stack(
                    [
                        rest.masked_fill(~before, -torch.inf).amax(1),
                        rest.masked_fill(before, -torch.inf).amax(1),
                    ]
                )
                side = side if shards is None else shards.max(side)
                emit("is_top1", (label_logit > side[0]) & (label_logit >= side[1]))
        if routing is not None:
            token_ids = torch.arange(chunk.start, chunk.stop, device=device)
            bitmap, most = route(
                _block_share(rest, rest_lse), labels, routing.taus, int(routing.seed), token_ids, shards
            )
            emit("bitmap", bitmap)
            emit("most_pairs", most)
    if not columns:  # no completion tokens
        columns = {name: [torch.empty(0, dtype=dtype, device=device)] for name in ("logps", "lse", *stats)}
        if "is_top1" in stats:
            columns["is_top1"] = [torch.empty(0, dtype=torch.bool, device=device)]
        if routing is not None:
            width = len(routing.taus) * set_bytes(num_blocks(head.weight.shape[0]))
            emit("bitmap", torch.empty(0, width, dtype=torch.uint8, device=device))
            emit("most_pairs", torch.empty(0, dtype=torch.int32, device=device))
    return Forward(**{name: torch.cat(values) for name, values in columns.items()})


def _block_share(rest: Tensor, rest_lse: Tensor) -> Tensor:
    """[n, blocks] fp32, from logits without the label's."""
    blocks = pad(rest, (0, -rest.shape[1] % BLOCK), value=-torch.inf).view(rest.shape[0], -1, BLOCK)
    return (blocks.logsumexp(2) - rest_lse[:, None]).exp().float()


def routed(dz: Tensor, share: Tensor, bits: Tensor, labels: Tensor, routing: Routing) -> list[Tensor]:
    """dz weighted for dhidden and for dweight: 1 / q where the pair was kept, 0 elsewhere."""
    own, one_set = own_block(labels, share.shape[1]), set_bytes(share.shape[1])

    def weighted(second: bool) -> Tensor:
        weights, which = pair_weights(odds(share, own, routing.taus[0])), bits[:, :one_set]
        if second:
            weights = weights * pair_weights(second_odds(share, own, *routing.taus))
            which = bits[:, one_set:]
        kept = unpack_bits(which, share.shape[1])
        weights = torch.where(kept, weights, 0).to(dz.dtype).repeat_interleave(BLOCK, 1)[:, : dz.shape[1]]
        return torch.where(weights == 0, 0, dz * weights)

    return [weighted(which == 1) if which >= 0 else dz for which in (routing.hidden_set, routing.weight_set)]


class HeadSums:
    """The gradients of a head, from its dz of some tokens after the other."""

    def __init__(self, head: Head, tokens: Tokens, needs: Needs):
        self.head, self.tokens = head, tokens
        dtype, device = accumulate_dtype(head), head.hidden.device
        hidden = head.hidden.new_empty(()).expand(tokens.num_rows, head.hidden.shape[1])
        self.sums = Gradients()
        for name, like in zip(Needs._fields, (hidden, *head.inputs[1:])):
            if getattr(needs, name):
                setattr(self.sums, name, torch.zeros(like.shape, dtype=dtype, device=device))
        self.of_hidden = needs.of_hidden
        self.weight = operand(head.weight, head)
        if head.lora is not None:
            self.lora_a, self.lora_b = operand(head.lora.a, head) * head.lora.scale, operand(head.lora.b, head)

    def add(self, chunk: slice, hidden: Tensor, dz_hidden: Tensor, dz_weight: Tensor) -> None:
        """`hidden` [n, H] of the chunk's tokens, with their dz [n, V] for either gradient."""
        sums = self.sums
        if self.of_hidden:
            dproduct = dz_hidden @ self.weight
            if self.head.lora is not None:
                dlow_rank = dz_hidden @ self.lora_b
                dproduct = dproduct + dlow_rank @ self.lora_a
                if sums.lora_a is not None:
                    sums.lora_a += self.head.lora.scale * dlow_rank.T @ hidden
            if sums.hidden is not None:
                sums.hidden[rows_of(self.tokens.rows, chunk)] = dproduct
        if sums.weight is not None:
            sums.weight += dz_weight.T @ hidden
        if sums.bias is not None:
            sums.bias += dz_weight.sum(0)
        if sums.lora_b is not None:
            sums.lora_b += dz_weight.T @ (hidden @ self.lora_a.T)

    def gradients(self, places: Gradients | None) -> Gradients:
        """Rounded once; `places` as engines take `sums`."""
        found = Gradients()
        for name, like in zip(Needs._fields, self.head.inputs):
            gradient, place = getattr(self.sums, name), None if places is None else getattr(places, name)
            if gradient is not None:
                setattr(found, name, gradient.to((like if place is None else place).dtype))
        return found.added_to(places)


def backward(
    head: Head,
    tokens: Tokens,
    saved: Forward,
    upstream: Upstream,
    routing: Routing | None,
    needs: Needs,
    sums: Gradients | None = None,
) -> Gradients:
    dtype, out = accumulate_dtype(head), HeadSums(head, tokens, needs)
    for chunk in chunks(tokens, head.weight.shape[0]):
        hidden = operand(head.hidden[rows_of(tokens.source_rows, chunk)], head)
        z, slope = logits_of(head, hidden)
        labels, logps, lse = tokens.labels[chunk], saved.logps[chunk], saved.lse[chunk]
        coef = upstream.coef[chunk].to(dtype)
        logp = z - lse[:, None]
        dz = -coef[:, None] * logp.exp()
        here = (labels >= 0) & (labels < z.shape[1])
        index = labels.clamp(0, z.shape[1] - 1)[:, None]
        label_dz = coef * -torch.expm1(logps)  # 1 - p before any rounding of p
        dz.scatter_(1, index, torch.where(here, label_dz, dz.gather(1, index)[:, 0])[:, None])
        if upstream.coef_entropy is not None:  # d(entropy)/dz = -p * (log p + entropy)
            p = logp.exp()
            weighted = upstream.coef_entropy[chunk].to(dtype)[:, None] * p * (logp + saved.entropy[chunk][:, None])
            dz -= torch.where(p > 0, weighted, 0 * p)
        dz *= slope
        dz = torch.where(coef[:, None] == 0, torch.zeros_like(dz), dz) if upstream.coef_entropy is None else dz
        dz_hidden = dz_weight = dz
        if routing is not None:
            rest, _ = without_label(z, labels)
            share = _block_share(rest, lse + (-torch.expm1(logps)).log())
            dz_hidden, dz_weight = routed(dz, share, saved.bitmap[chunk], labels, routing)
        out.add(chunk, hidden, dz_hidden, dz_weight)
    return out.gradients(sums)


def logits_forward(
    logits: Tensor, labels: Tensor, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[N, V] logits, [N] labels (< 0: none) -> (logps, lse, entropy or None), fp32 (fp64 for fp64 logits)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logps, lse, entropy = (torch.empty(logits.shape[0], dtype=dtype, device=logits.device) for _ in range(3))
    for rows in _row_chunks(logits):
        z = logits[rows].to(dtype) / temperature
        rest, label_logit = without_label(z, labels[rows])
        rest_lse = rest.logsumexp(1)
        logps[rows] = -torch.nn.functional.softplus(rest_lse - label_logit, threshold=60)
        lse[rows] = torch.logaddexp(rest_lse, label_logit)
        if with_entropy:  # from differences to the largest logit, so that it does not lose digits to its magnitude
            d = z - z.amax(1, keepdim=True)
            e = d.exp()
            total = e.sum(1)
            entropy[rows] = total.log() - torch.where(e > 0, e * d, 0 * e).sum(1) / total
    return logps, lse, entropy if with_entropy else None


def logits_backward(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    temperature: float,
    out: Tensor,
    entropy: Tensor | None = None,
    coef_entropy: Tensor | None = None,
) -> None:
    """dlogits into `out`, which may be `logits`; zeros where the coefs are 0:
    (coef * (1[v = label] - p) - coef_entropy * p * (log p + entropy)) / temperature."""
    for rows in _row_chunks(logits):
        logp = logits[rows].to(lse.dtype) / temperature - lse[rows, None]
        p = logp.exp()
        dz = -coef[rows, None] * p
        here = labels[rows] >= 0
        index = labels[rows].clamp(min=0)[:, None]
        label_dz = coef[rows] * -torch.expm1(logps[rows])
        dz.scatter_(1, index, torch.where(here, label_dz, dz.gather(1, index)[:, 0])[:, None])
        no_gradient = coef[rows] == 0
        if coef_entropy is not None:
            weighted = coef_entropy[rows, None] * p * (logp + entropy[rows, None])
            dz -= torch.where(p > 0, weighted, 0 * p * coef_entropy[rows, None])
            no_gradient &= coef_entropy[rows] == 0
        out[rows] = (dz / temperature).masked_fill_(no_gradient[:, None], 0.0).to(out.dtype)


def _row_chunks(logits: Tensor):
    size = max(1, LOGITS_BYTES // (logits.shape[1] * 4))
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))
