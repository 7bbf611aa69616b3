// The lists of pair_lists.cu, one token after the other.
#include "pair_lists.h"

namespace fastdpo {
namespace {

// The bits of 32 tokens from `token` on that keep block `k` of the word.
uint32_t column(const PairListArgs& a, int64_t token, int64_t word, int k) {
  uint32_t mask = 0;
  for (int i = 0; i < kWordBlocks; ++i) mask |= (kept_word(a, token + i, word) >> k & 1u) << i;
  return mask;
}

}  // namespace

void host_pair_lists(const PairListArgs& a) {
  int32_t tiles = 0;
  int64_t pairs = 0;
  for (int64_t block = 0; block < a.num_blocks; ++block) {
    int32_t length = 0;
    for (int64_t row = 0; row < list_rows(a); ++row) {
      for (int64_t token = row * kListTokens; token < (row + 1) * kListTokens; token += 32) {
        length += __builtin_popcount(column(a, token, block / kWordBlocks, block % kWordBlocks));
      }
      a.running[row * a.num_blocks + block] = length;
    }
    a.lengths[block] = length;
    a.first_tile[block] = tiles;
    tiles += tiles_of(a, length);
    pairs += length;
  }
  a.first_tile[a.num_blocks] = tiles;
  *a.is_routed = lists_pay(a, pairs);
  for (int32_t round = 0; round < a.rounds; ++round) {
    a.round_block[round] = block_from_tile(a, static_cast<int64_t>(round) * a.tiles_per_round);
  }
  a.round_block[a.rounds] = static_cast<int32_t>(a.num_blocks);
  if (!*a.is_routed) return;
  for (int64_t block = 0; block < a.num_blocks; ++block) {
    int32_t before = 0;
    for (int64_t token = 0; token < a.capacity; token += 32) {
      const uint32_t mask = column(a, token, block / kWordBlocks, block % kWordBlocks);
      list_tokens(a, block, mask, token, before);
      before += __builtin_popcount(mask);
    }
  }
}

}  // namespace fastdpo
