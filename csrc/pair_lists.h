// The bitmap of kept pairs -> per block of the vocabulary the list of its tokens, in their order, cut into work tiles.
// pair_lists.cu makes them on a GPU in three launches, pair_lists_host.cpp on the CPU; both from the functions here.
//
// A list's last tile is padded; tiles of all blocks are numbered in vocabulary order, and rounds of whole blocks bound
// what of them is in memory at once. Every size stays on the device: what a reader needs to know lies in the arrays.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastdpo {

constexpr int kListTokens = 128;  // tokens of one row of `running`
constexpr int kWordBlocks = 32;   // blocks of the vocabulary that one word of kept bits covers

struct PairListArgs {
  const uint8_t* bitmap;  // [rows, bitmap_stride]: bit b % 8 of byte b / 8 says whether the row keeps block b
  int64_t bitmap_stride;
  const float* coef;     // [rows] dL/dlogp: a row with 0 has no gradient, so no pairs
  const int32_t* rows;   // [tokens] row of each token
  const int32_t* count;  // [1] how many tokens there are
  int64_t first_token, capacity;  // tokens [first_token, first_token + capacity), as far as they exist, are listed
  int64_t first_block, num_blocks;
  int32_t tile, tiles_per_round, rounds;
  double crossover;  // share of live pairs up to which the lists are used
  // What is made. Tokens and blocks are numbered from first_token and first_block.
  int32_t* running;      // [ceil(capacity / kListTokens), num_blocks] pairs of a block up to this many tokens, inclusive
  int32_t* lengths;      // [num_blocks]
  int32_t* first_tile;   // [num_blocks + 1]
  int32_t* round_block;  // [rounds + 1] first block of each round
  int32_t* is_routed;    // [1]; where it is 0, the two below are not written
  int32_t* tile_block;   // [tiles] block of each tile
  int32_t* tokens;       // [tiles * tile]; padding is not written
  int32_t* finished;     // [1] scratch: thread blocks that are done
};

FASTDPO_HD inline int64_t list_rows(const PairListArgs& a) { return (a.capacity + kListTokens - 1) / kListTokens; }
FASTDPO_HD inline int64_t list_words(const PairListArgs& a) { return (a.num_blocks + kWordBlocks - 1) / kWordBlocks; }

FASTDPO_HD inline int64_t tokens_in_range(const PairListArgs& a) {
  const int64_t left = a.count[0] - a.first_token;
  return left < 0 ? 0 : left < a.capacity ? left : a.capacity;
}

// Which of 32 blocks token `i` keeps, bit k for block 32 * word + k. No byte is read that holds none of them.
FASTDPO_HD inline uint32_t kept_word(const PairListArgs& a, int64_t i, int64_t word) {
  if (i >= tokens_in_range(a)) return 0;
  const int64_t row = a.rows[a.first_token + i];
  if (a.coef[row] == 0.0f) return 0;
  const int64_t left = a.num_blocks - word * kWordBlocks;
  const int64_t wanted = left < kWordBlocks ? left : kWordBlocks;
  const int64_t first = a.first_block + word * kWordBlocks;
  const int64_t last_byte = (first + wanted - 1) >> 3;
  const uint8_t* bytes = a.bitmap + row * a.bitmap_stride;
  uint64_t bits = 0;
  for (int64_t byte = first >> 3, shift = 0; byte <= last_byte; ++byte, shift += 8) {
    bits |= static_cast<uint64_t>(bytes[byte]) << shift;
  }
  return static_cast<uint32_t>((bits >> (first & 7)) & ((uint64_t{1} << wanted) - 1));
}

FASTDPO_HD inline int32_t tiles_of(const PairListArgs& a, int32_t length) { return (length + a.tile - 1) / a.tile; }

// The first block whose tiles begin at `tile` or later: where a round begins.
FASTDPO_HD inline int32_t block_from_tile(const PairListArgs& a, int64_t tile) {
  int64_t low = 0, high = a.num_blocks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.first_tile[middle] < tile) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

FASTDPO_HD inline bool lists_pay(const PairListArgs& a, int64_t pairs) {
  return static_cast<double>(pairs) <= a.crossover * tokens_in_range(a) * a.num_blocks;
}

// 32 tokens from `token` on, of which `mask` says which keep the block; `before` of its pairs are of earlier tokens.
FASTDPO_HD inline void list_tokens(const PairListArgs& a, int64_t block, uint32_t mask, int64_t token, int32_t before) {
  const int64_t first = a.first_tile[block];
  for (int32_t rank = before; mask != 0; ++rank, ++token) {
    while ((mask & 1) == 0) {
      mask >>= 1;
      ++token;
    }
    mask >>= 1;
    a.tokens[first * a.tile + rank] = static_cast<int32_t>(token);
    if (rank % a.tile == 0) a.tile_block[first + rank / a.tile] = static_cast<int32_t>(block);  // a tile's first pair
  }
}

#ifdef FASTDPO_HAVE_CUDA
// Returns the cudaError of the launches, 0 for none. `device` must be the one that `stream` belongs to.
int launch_pair_lists(const PairListArgs&, int device, void* stream);
#endif
void host_pair_lists(const PairListArgs&);  // for tests

}  // namespace fastdpo
