// Every struct that crosses from Python to the kernels: pointers, sizes and scalars. No tensor type crosses, so one
// build serves every torch. Sizes and strides count elements and are 64-bit.
//
// `fields` of a struct is the list of the keywords that a Python call gives, all of them; arguments.h reads them.
//   in.numbers(NAMED(x, y))                        numbers
//   in.sizes(NAMED(n, first))                      numbers from 0 to kMostElements
//   in.arrays(count, NAMED(a, b))                  contiguous tensors of the pointers' types, `count` elements or more
//   in.optional(count, NAMED(a, b))                ... or None, which is null
//   in.vector(count, NAMED(a), size)               one such tensor; sets how many there are
//   in.matrix(NAMED(a), stride, num_rows, columns) contiguous rows, `stride` apart; sets all three
//   in.rows(NAMED(a), stride, num_rows, columns)   ... sets the stride; of so many rows and columns or more
//   in.pairs(count, NAMED(a, b))                   tuples of a tensor or None for each side, or None for both
#pragma once

#include <cstdint>
#include <limits>

#include "shared/half.h"

#define NAMED(...) #__VA_ARGS__, __VA_ARGS__

namespace fastdpo {

constexpr int64_t kBlock = 128;  // vocabulary columns per block: the unit of routing
constexpr int64_t blocks_of(int64_t num_cols) { return (num_cols + kBlock - 1) / kBlock; }
constexpr int64_t bytes_of(int64_t num_bits) { return (num_bits + 7) / 8; }

constexpr int64_t kMostElements = int64_t{1} << 48;  // more than there is memory for: sums of some still fit 64 bits
// Of sizes; one that does not fit 64 bits is the largest, which no tensor has.
inline int64_t product_of(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}
// How far to the right of `start` a column lies that may be any number; not between 0 and a size where it is left of it.
constexpr int64_t columns_past(int64_t column, int64_t start) {
  return static_cast<int64_t>(static_cast<uint64_t>(column) - static_cast<uint64_t>(start));
}

// z = inv_temperature * softcap * tanh(scale * (product + bias) / softcap); softcap == 0 means none.
struct LogitTransform {
  float scale;
  float softcap;
  float inv_temperature;

  template <class In> void fields(In& in) {
    double temperature = 1.0;
    in.tuple("transform", scale, softcap, temperature);
    inv_temperature = static_cast<float>(1.0 / temperature);
  }
};

// One tile of raw products `hidden @ weight[col_start : col_start + num_cols].T`, fp32, rows contiguous.
struct Tile {
  float* data;  // [num_rows, num_cols]
  int64_t stride, num_rows, num_cols;
  int64_t col_start;  // vocabulary index of the first column; a multiple of kBlock
  const float* bias;  // [num_cols] or null
  LogitTransform transform;

  // A fold only reads it: rows may overlap then.
  template <class In> void fields(In& in, bool only_read = false) {
    const float* read = nullptr;
    if (only_read) in.matrix("data", read, stride, num_rows, num_cols);
    else in.matrix(NAMED(data), stride, num_rows, num_cols);
    if (only_read) data = const_cast<float*>(read);
    in.sizes(NAMED(col_start));
    in.require_value(col_start % kBlock == 0, "col_start must begin a block");
    in.optional(num_cols, NAMED(bias));
    transform.fields(in);
  }
};

// Running statistics of one token over the vocabulary; cpu/row_stats.h fills and reads them. `max`, `sum_exp`,
// `sum_exp_z` and `sum_exp_sq` leave the label out (it is added back in the end), which keeps 1 - p[label] exact for
// confident tokens.
struct RowStats {
  double max;         // m = max of the other logits
  double sum_exp;     // sum exp(z - m)
  double sum_exp_z;   // sum exp(z - m) * (z - m)
  double sum_exp_sq;  // sum exp(z - m)^2
  double sum_z;       // sum of every logit
  double max_before;  // largest logit left of the label
  double max_after;   // and right of it
};
constexpr const char* kRowStatsNames[] = {"max",   "sum_exp",    "sum_exp_z", "sum_exp_sq",
                                          "sum_z", "max_before", "max_after"};
constexpr double kNoLogit = -std::numeric_limits<double>::infinity();
constexpr double kNoRowStats[] = {kNoLogit, 0, 0, 0, 0, kNoLogit, kNoLogit};  // before the first block
constexpr int64_t kRowStatsSize = sizeof(RowStats) / sizeof(double);

struct FoldArgs {
  Tile tile;
  const int64_t* labels;  // [num_rows] vocabulary index; outside the tile's columns: none
  double* block_lse;      // [num_rows, blocks of the tile], the label's own logit left out; fp32 lacks digits at 1e4
  int64_t block_lse_stride;
  float* label_logit;  // [num_rows], written by the tile that holds the label
  RowStats* stats;     // [num_rows] or null
  int num_threads;

  template <class In> void fields(In& in) {
    tile.fields(in, true);
    in.arrays(tile.num_rows, NAMED(labels, label_logit));
    in.rows(NAMED(block_lse), block_lse_stride, tile.num_rows, blocks_of(tile.num_cols));
    in.optional(tile.num_rows, NAMED(stats));
    in.numbers(NAMED(num_threads));
  }
};

// [num_rows, num_blocks] -> [num_rows] log-sum-exp.
struct SumBlocksArgs {
  const double* block_lse;
  int64_t stride, num_rows, num_blocks;
  double* rest_lse;
  int num_threads;

  template <class In> void fields(In& in) {
    in.matrix(NAMED(block_lse), stride, num_rows, num_blocks);
    in.arrays(num_rows, NAMED(rest_lse));
    in.numbers(NAMED(num_threads));
  }
};

// Block sums -> lse, logps and statistics.
struct FinishArgs {
  int64_t num_rows, vocab_size;
  const double* rest_lse;    // [num_rows] log-sum-exp of every logit but the label's
  const float* label_logit;  // [num_rows]
  const RowStats* stats;     // or null
  float* logps;              // [num_rows]
  float* lse;                // [num_rows]
  float* entropy;            // [num_rows] or null, as the three below; all need stats
  float* mean_logit;
  uint8_t* is_top1;
  float* log_sum_sq_probs;
  int num_threads;

  template <class In> void fields(In& in) {
    in.sizes(NAMED(num_rows, vocab_size));
    in.numbers(NAMED(num_threads));
    in.arrays(num_rows, NAMED(rest_lse, label_logit, logps, lse));
    in.optional(num_rows, NAMED(stats, entropy, mean_logit, is_top1, log_sum_sq_probs));
    in.require(stats || !(entropy || mean_logit || is_top1 || log_sum_sq_probs), "a statistic needs stats");
  }
};

// Block sums -> the pairs that the backward computes.
struct RouteArgs {
  const double* block_lse;  // [num_rows, num_blocks]
  int64_t stride, num_rows, num_blocks;
  int64_t first_row;       // index of row 0 among all completion tokens: the generator's counter
  const double* rest_lse;  // [num_rows]
  const int64_t* labels;   // [num_rows]
  float tau;
  float second_tau;  // negative: one set of pairs
  uint64_t seed;
  const int64_t* before;  // [2, num_rows] odds of both sets on lower shards, or null
  int64_t* sums;          // [2, num_rows] what this shard adds to them, or null
  uint8_t* bitmap;        // [num_rows, bitmap_stride] one bit per block, then, set_bytes on, those of the smaller set
  int64_t bitmap_stride, set_bytes;
  int32_t* most_pairs;  // [num_rows] most pairs of the first set, whatever the draw
  int num_threads;

  template <class In> void fields(In& in) {
    in.matrix(NAMED(block_lse), stride, num_rows, num_blocks);
    in.sizes(NAMED(first_row));
    in.numbers(NAMED(tau, second_tau, seed, num_threads));
    in.arrays(num_rows, NAMED(rest_lse, labels, most_pairs));
    in.optional(2 * num_rows, NAMED(before, sums));
    set_bytes = bytes_of(num_blocks);
    in.rows(NAMED(bitmap), bitmap_stride, num_rows, second_tau < 0 ? set_bytes : 2 * set_bytes);
  }
};

// dlogp -> d(raw product), in place of the tile.
struct GradArgs {
  Tile tile;
  const int32_t* tokens;  // [num_rows] index into the arrays below; null: row i is token i
  int64_t num_tokens;
  const int64_t* labels;  // [num_tokens], as the six below
  const float *lse, *logps;
  const float* coef;          // dL/dlogp
  const float* entropy;       // both null, or both given
  const float* coef_entropy;  // dL/dentropy
  const float* coef_lse;      // dL/dlse, or null
  int num_threads;

  template <class In> void fields(In& in) {
    tile.fields(in);
    in.optional(tile.num_rows, NAMED(tokens));
    token_fields(in, tokens ? 0 : tile.num_rows);
    in.numbers(NAMED(num_threads));
    for (int64_t i = 0; tokens && i < tile.num_rows; ++i) {
      in.require_value(tokens[i] >= 0 && tokens[i] < num_tokens, "tokens must be of the arrays that they index");
    }
  }
  // Of `count` tokens or more.
  template <class In> void token_fields(In& in, int64_t count) {
    in.vector(count, NAMED(labels), num_tokens);
    in.arrays(num_tokens, NAMED(lse, logps, coef));
    in.optional(num_tokens, NAMED(entropy, coef_entropy, coef_lse));
    in.require(!entropy == !coef_entropy, "entropy and coef_entropy go together");
  }
};

// Of so many lists, side by side or apart, in so many places.
template <class In>
void require_offsets(In& in, const int64_t* offsets, int64_t count, int64_t num_places) {
  bool ascending = offsets[0] >= 0 && offsets[count] <= num_places;
  for (int64_t i = 0; i < count; ++i) ascending &= offsets[i] <= offsets[i + 1];
  in.require_value(ascending, "offsets must ascend, and be of rows");
}

// A set of pairs whose tokens have a gradient: coef == 0 leaves a token out.
struct PairSet {
  const uint8_t* bitmap;  // [num_tokens, bytes]
  int64_t bitmap_stride;
  const float* coef;  // [num_tokens]
  int64_t first_token, last_token;  // those asked for
  int64_t first_block, num_blocks;
  int num_threads;

  template <class In> void fields(In& in) {
    in.sizes(NAMED(first_token, last_token, first_block, num_blocks));
    in.numbers(NAMED(num_threads));
    in.rows(NAMED(bitmap), bitmap_stride, last_token, bytes_of(first_block + num_blocks));
    in.arrays(last_token, NAMED(coef));
  }
};

// -> how many tokens each of the blocks has.
struct CountPairsArgs {
  PairSet set;
  int64_t* counts;  // [num_blocks]

  template <class In> void fields(In& in) {
    set.fields(in);
    in.arrays(set.num_blocks, NAMED(counts));
  }
};

// -> and which.
struct FillPairsArgs {
  PairSet set;
  const int64_t* offsets;  // [num_blocks + 1]
  int32_t* tokens;         // ascending inside a block, whatever the threads
  int64_t num_places;

  template <class In> void fields(In& in) {
    set.fields(in);
    in.arrays(set.num_blocks + 1, NAMED(offsets));
    in.vector(0, NAMED(tokens), num_places);
    in.require_value(set.last_token <= INT32_MAX, "tokens have 32 bits");
    require_offsets(in, offsets, set.num_blocks, num_places);
  }
};

constexpr int64_t kLeftOut = -2;       // in `labels` of given logits
constexpr int64_t kPartialFloats = 3;  // of one part of a row in `partials`
constexpr int64_t kMostSplits = 65535;

// Given logits of any of the three types -> log p of one column per row, and back. On both machines.
struct LogitsArgs {
  const void* logits;  // [num_rows, vocab_size], columns contiguous
  int64_t logits_stride, num_rows, vocab_size;
  DType dtype;
  const int64_t* labels;  // [num_rows] column; -1: none, lse alone; kLeftOut: the row is not read, its results are 0
  float* logps;           // [num_rows], written by the forward and read by the backward, as the two below
  float* lse;
  float* entropy;  // or null
  float inv_temperature;
  int64_t splits;  // parts of a row, each walked by a block of threads of its own

  template <class In> void fields(In& in) {
    in.dtype_of("logits", dtype);
    in.matrix(NAMED(logits), logits_stride, num_rows, vocab_size);
    in.arrays(num_rows, NAMED(labels, logps, lse));
    in.optional(num_rows, NAMED(entropy));
    in.numbers(NAMED(inv_temperature));
    in.sizes(NAMED(splits));
    in.require_value(splits >= 1 && splits <= kMostSplits, "splits must be the second size of a grid");
  }
};

struct LogitsForwardArgs : LogitsArgs {
  float* partials;  // scratch [num_rows, splits, kPartialFloats]; null where splits is 1

  template <class In> void fields(In& in) {
    LogitsArgs::fields(in);
    in.optional(product_of(num_rows, splits * kPartialFloats), NAMED(partials));
    in.require(partials || splits == 1 || num_rows == 0, "splits need partials");
  }
};

struct LogitsBackwardArgs : LogitsArgs {
  const float* coef;          // [num_rows] dL/dlogp; 0, and the other too: the row gets zeros and is not read
  const float* coef_entropy;  // dL/dentropy; null, or given with the entropy
  void* dlogits;              // [num_rows, vocab_size] of the logits' type; may be the logits
  int64_t dlogits_stride;

  template <class In> void fields(In& in) {
    LogitsArgs::fields(in);
    in.arrays(num_rows, NAMED(coef));
    in.optional(num_rows, NAMED(coef_entropy));
    in.require(!coef_entropy || entropy, "coef_entropy needs the entropy");
    in.rows(NAMED(dlogits), dlogits_stride, num_rows, vocab_size);
    in.may_share("logits", "dlogits");
    in.require(dlogits != logits || dlogits_stride == logits_stride || num_rows <= 1, "in place of other rows");
  }
};

}  // namespace fastdpo

#undef NAMED
