"""Which (token, block) pairs the routed backward computes: the rule in readable torch, the kernels' oracle.

    kept   when mass >= tau, or when the block holds the label      weight 1
    kept   with probability q = mass / tau otherwise                weight 1 / q
    E[weight * dz] = dz, and at most 1 / tau + 1 pairs per token are expected, whatever the distribution.

csrc/routing.h is the same rule for the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BLOCK = 128  # vocabulary columns per block

# Chosen so that on a trained head the gradient's error stays below that of bf16 logits, and so that training, where
# Adam amplifies noise in rows of the head with tiny gradients, stays with the exact run: benchmarks/results/.
DEFAULT_TAU = (2.0**-10, 2.0**-12)  # (dhidden, dweight)

SECOND_SET_BYTES = 8 << 20


@dataclass(frozen=True)
class Routing:
    """`tau` of each gradient and the generator's key; a negative `tau` says that gradient is not wanted."""

    tau_hidden: float
    tau_weight: float
    seed: torch.Tensor | int  # 0-d int64 on hidden's device, the key's 64 bits; for engines that take tokens their int

    @property
    def tau(self) -> float:
        """The smaller wanted `tau`: its kept set holds the other's, since both use one draw per pair."""
        return min(tau for tau in (self.tau_hidden, self.tau_weight) if tau >= 0)


def parse_tau(tau) -> tuple[float, float]:
    """`tau` as the public functions take it -> (dhidden, dweight)."""
    if tau is None:
        return DEFAULT_TAU
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


def bitmap_bytes(num_rows: int, num_blocks: int, routing: Routing) -> int:
    """Of one row of a bitmap with room for the pairs kept at the smaller `tau` and, if it takes little memory, for
    those kept at the larger too: dhidden and dweight, swept separately, then each visit only their own pairs.
    """
    one = -(-num_blocks // 8)
    two = min(routing.tau_hidden, routing.tau_weight) >= 0 and routing.tau_hidden != routing.tau_weight
    return 2 * one if two and num_rows * one <= SECOND_SET_BYTES else one


def philox(seed: int, token: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 words of counter (token, group) under key `seed`, as int64 in [0, 2^32): shape [..., 4].

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
    """
    mask = 0xFFFFFFFF

    def mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # 32 x 32 -> 64 bits by halves of b: int64 products stay below 2^63
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        total = high + (low >> 16)
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    token, group = torch.broadcast_tensors(token.long(), group.long())
    c0, c1, c2, c3 = token & mask, (token >> 32) & mask, group & mask, torch.zeros_like(group)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = mulhilo(0xD2511F53, c0)
        high1, low1 = mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=-1)


def pair_uniforms(seed: int, tokens: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[N] tokens, [K] blocks -> [N, K] fp32 uniforms in (0, 1), one per pair, independent of any tiling."""
    words = philox(seed, tokens[:, None], (blocks >> 2)[None, :])
    word = words.gather(-1, (blocks & 3).expand(words.shape[:-1])[..., None])[..., 0]
    return ((word >> 8).float() + 0.5) * 2.0**-24


def kept_pairs(
    mass: torch.Tensor,  # [N, K] probability of each block
    labels: torch.Tensor,  # [N]
    tau: float,
    uniforms: torch.Tensor,  # [N, K]
    first_block: int = 0,
) -> torch.Tensor:
    """[N, K] bool. Written so that a NaN mass is kept: a poisoned row shows in its gradient."""
    blocks = torch.arange(first_block, first_block + mass.shape[1], device=mass.device)
    holds_label = (labels[:, None] // BLOCK) == blocks
    return holds_label | ~(mass < tau * uniforms)


def importance_weights(
    mass: torch.Tensor, labels: torch.Tensor, tau: float, uniforms: torch.Tensor, first_block: int = 0
) -> torch.Tensor:
    """[N, K] fp32: 1 / P(kept) for kept pairs, 0 for the others."""
    blocks = torch.arange(first_block, first_block + mass.shape[1], device=mass.device)
    holds_label = (labels[:, None] // BLOCK) == blocks
    weight = torch.where((mass < tau) & ~holds_label, tau / mass, torch.ones_like(mass))
    return torch.where(kept_pairs(mass, labels, tau, uniforms, first_block), weight, torch.zeros_like(mass))


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """[N, K] bool -> [N, ceil(K / 8)] uint8, pair k in bit k % 8 of byte k // 8."""
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.shape[1] % 8))
    powers = 2 ** torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (padded.view(kept.shape[0], -1, 8) * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap: torch.Tensor, num_pairs: int) -> torch.Tensor:
    """The inverse of `pack_bits`: [N, num_pairs] bool."""
    bits = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device, dtype=torch.uint8)) & 1
    return bits.reshape(bitmap.shape[0], bitmap.shape[1] * 8)[:, :num_pairs].bool()
