"""Which (token, block) pairs the routed backward computes: the rule in readable torch, the kernels' oracle.

    dz = coef * (1 - p[label]) * (e_label - tail)       tail = the distribution over all ids but the label
    share[b] = the tail's mass in block b               a token's shares sum to 1
    q[b] = min(1, share[b] / tau), 1 for the label's block: the probability to be kept; a kept dz is multiplied by 1 / q

Kept by systematic sampling: one uniform per token, carried through the running sum of q. E[dz] = dz, every draw's
weights sum to within tau of 1, and at most 1 / tau + 2 pairs are kept. csrc/shared/routing.h is the same rule, native.
"""

from __future__ import annotations

import torch

BLOCK = 128  # vocabulary columns per block
ONE = 1 << 32  # probability 1 in fixed point: integer sums have the same bits in any order, so no tile or shard shows


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


def shares(
    logits: torch.Tensor,  # [N, V]
    labels: torch.Tensor,  # [N]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each block in each token's tail, and whether the block holds the label: [N, K]. Makes the logits' softmax."""
    rest = logits.scatter(1, labels[:, None], -torch.inf)
    rest = torch.nn.functional.pad(rest, (0, -rest.shape[1] % BLOCK), value=-torch.inf)
    share = rest.softmax(1).view(len(rest), -1, BLOCK).sum(2)
    return share, own_block(labels, share.shape[1])


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
    taus: tuple[float, ...],  # one, or two, ascending: of the set of kept pairs, of a smaller one in it
    seed: int,
    tokens: torch.Tensor,  # [N] the generator's counters
    shards=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, len(taus) * set_bytes(K)] uint8 kept pairs, [N] int32 the most pairs that any draw keeps)."""
    own, draws = own_block(labels, share.shape[1]), philox(seed, tokens)

    def sample(odds: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        return keep(odds, draw if shards is None else draw + shards.sum_before(odds.sum(1) % ONE))

    first = odds(share, own, taus[0])
    kept = sample(first, draws[:, 0])
    bitmap = pack_bits(kept)
    if len(taus) == 2:
        second = second_odds(share, own, *taus) * kept
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
