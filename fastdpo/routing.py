"""Which (token, block) pairs the routed backward computes: the rule in readable torch, the kernels' oracle.

    dz = coef * (1 - p[label]) * (e_label - tail)       tail = the distribution over all ids but the label
    share[b] = the tail's mass in block b               a token's shares sum to 1
    q[b] = min(1, share[b] / tau), 1 for the label's block: the probability to be kept; a kept dz is multiplied by 1 / q

Kept by systematic sampling: one uniform per token, carried through the running sum of q. E[dz] = dz, every draw's
weights sum to within tau of 1, and at most 1 / tau + 2 pairs are kept. csrc/shared/routing.h is the same rule, native.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BLOCK = 128  # vocabulary columns per block
ONE = 1 << 32  # probability 1 in fixed point: integer sums have the same bits in any order, so no tile or shard shows

# Chosen so that on a trained head every error (overall, of sure tokens, of the worst token, of dweight) stays below
# that of bf16 logits, and that training, where Adam amplifies noise in rows of the head with tiny gradients, follows
# the exact run. One set of pairs serves both gradients: benchmarks/results/.
DEFAULT_TAU = 2.0**-10
FROZEN_HEAD_TAU = 2.0**-9  # where dhidden alone is wanted


@dataclass(frozen=True)
class Routing:
    """`tau` of each gradient and the generator's key; a negative `tau` says that gradient is not wanted."""

    tau_hidden: float
    tau_weight: float
    seed: torch.Tensor | int | None = None  # 0-d int64 on hidden's device, the key's 64 bits; None in the backward

    @property
    def tau(self) -> float:
        """The smaller wanted `tau`: its kept set holds the other's."""
        return min(tau for tau in (self.tau_hidden, self.tau_weight) if tau >= 0)

    @property
    def second_tau(self) -> float | None:
        """The larger, where both gradients are wanted and they differ."""
        two = min(self.tau_hidden, self.tau_weight) >= 0 and self.tau_hidden != self.tau_weight
        return max(self.tau_hidden, self.tau_weight) if two else None

    def bitmap_bytes(self, num_blocks: int) -> int:
        """Of one row of a bitmap: one bit per pair, then one more for the second, smaller set."""
        return set_bytes(num_blocks) * (1 if self.second_tau is None else 2)


def parse_tau(tau, of_weight: bool = True) -> tuple[float, float]:
    """`tau` as the public functions take it -> (dhidden, dweight); `of_weight`: the head takes a gradient."""
    if tau is None:
        tau = DEFAULT_TAU if of_weight else FROZEN_HEAD_TAU
    values = tuple(tau) if isinstance(tau, (tuple, list)) else (tau, tau)
    if len(values) != 2:
        raise ValueError(f"tau must be one number or two, (dhidden, dweight); got {tau!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"tau must be a number in [0, 1] or a pair of them; got {tau!r}")
        if not 0.0 <= value <= 1.0 or math.isnan(value):
            raise ValueError(f"tau must lie in [0, 1]; got {tau!r}")
    return float(values[0]), float(values[1])


def num_blocks(vocab_size: int) -> int:
    return -(-vocab_size // BLOCK)


def set_bytes(num_blocks: int) -> int:
    """Of one token's set of pairs."""
    return -(-num_blocks // 8)


def philox(seed: int, token: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 words of counter `token` under key `seed`, as int64 in [0, 2^32): shape [..., 4].

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
    """
    mask = 0xFFFFFFFF

    def mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # 32 x 32 -> 64 bits by halves of b: int64 products stay below 2^63
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        total = high + (low >> 16)
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    token = token.long()
    c0, c1, c2, c3 = token & mask, (token >> 32) & mask, torch.zeros_like(token), torch.zeros_like(token)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = mulhilo(0xD2511F53, c0)
        high1, low1 = mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def odds(
    share: torch.Tensor,  # [N, K] fp32
    own: torch.Tensor,  # [N, K] bool: the block holds the label
    tau: float,
) -> torch.Tensor:
    """[N, K] int64: q as a fraction of ONE. A NaN share is kept, so that a poisoned row shows in its gradient."""
    share = share.float()
    # at least one unit where there is anything to compute; below 1 by rounding at most to ONE
    q = (share / tau * ONE).clamp(1, ONE).long() if tau > 0 else torch.full_like(share, ONE, dtype=torch.int64)
    q = torch.where(share == 0, 0, q)
    return torch.where(own | ~(share < tau), ONE, q)


def second_odds(share: torch.Tensor, own: torch.Tensor, tau: float, second_tau: float) -> torch.Tensor:
    """[N, K] int64: P(in the set of the larger `second_tau`), given that the pair is in that of `tau`."""
    return odds(share.clamp(min=tau), own, second_tau)


def keep(odds: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """[N, K] bool: systematic sampling, `start` [N] the draw plus the odds of blocks on lower shards.

    The running sum takes every integer point that lies `start` past a whole number: where it carries.
    """
    after = (odds.cumsum(1) + start[:, None]) % ONE
    before = (after - odds) % ONE
    return (odds == ONE) | (after < before)


def most_pairs(odds: torch.Tensor) -> torch.Tensor:
    """[N] int32: the most pairs that any draw keeps, the expected number rounded up."""
    return ((odds.sum(1) + ONE - 1) // ONE).int()


def pair_weights(odds: torch.Tensor) -> torch.Tensor:
    """[N, K] fp32: 1 / q."""
    return ONE / odds.clamp(min=1).float()


def own_block(labels: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """[N, num_blocks] bool: which block holds the label, a column of this shard or outside of it."""
    return (labels[:, None].div(BLOCK, rounding_mode="floor")) == torch.arange(num_blocks, device=labels.device)


def route(
    share: torch.Tensor,  # [N, K] fp32
    labels: torch.Tensor,  # [N] columns of this shard
    routing: Routing,
    tokens: torch.Tensor,  # [N] the generator's counters
    shards=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, routing.bitmap_bytes(K)] uint8 kept pairs, [N] int32 the most pairs that any draw keeps)."""
    own, draws = own_block(labels, share.shape[1]), philox(int(routing.seed), tokens)

    def sample(odds: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        return keep(odds, draw if shards is None else draw + shards.sum_before(odds.sum(1) % ONE))

    first = odds(share, own, routing.tau)
    kept = sample(first, draws[:, 0])
    bitmap = pack_bits(kept)
    if routing.second_tau is not None:
        second = second_odds(share, own, routing.tau, routing.second_tau) * kept
        bitmap = torch.cat((bitmap, pack_bits(sample(second, draws[:, 1]) & kept)), 1)
    return bitmap, most_pairs(first)


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """[N, K] bool -> [N, ceil(K / 8)] uint8, pair k in bit k % 8 of byte k // 8."""
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    powers = 2 ** torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (padded.view(kept.shape[0], -1, 8) * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """The inverse of `pack_bits`: [N, num_pairs] bool."""
    bits = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device, dtype=torch.uint8)) & 1
    return bits.reshape(bitmap.shape[0], bitmap.shape[1] * 8)[:, :num_pairs].bool()
