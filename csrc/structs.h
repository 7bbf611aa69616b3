// The whole seam between Python and the kernels: plain structs of pointers, sizes and scalars. No tensor type
// crosses it, so one build serves every torch. Sizes and strides count elements and are 64-bit.
#pragma once

#include <cstdint>

namespace fastdpo {

constexpr int64_t kBlock = 128;  // vocabulary columns per block: the unit of routing

// z = inv_temperature * softcap * tanh(scale * (product + bias) / softcap); softcap == 0 means none.
struct LogitTransform {
  float scale;
  float softcap;
  float inv_temperature;
};

// One tile of raw products `hidden @ weight[col_start : col_start + num_cols].T`, fp32, rows contiguous.
struct Tile {
  float* data;  // [num_rows, num_cols]
  int64_t stride;
  int64_t num_rows;
  int64_t num_cols;
  int64_t col_start;   // vocabulary index of the first column; a multiple of kBlock
  const float* bias;   // [num_cols] or null
  LogitTransform transform;
};

// Running statistics of one token over the vocabulary. `max`, `sum_exp`, `sum_exp_z` and `sum_exp_sq` leave the
// label out (it is added back in `finish`), which keeps 1 - p[label] exact for confident tokens.
struct RowStats {
  double max;         // m = max of the other logits
  double sum_exp;     // sum exp(z - m)
  double sum_exp_z;   // sum exp(z - m) * (z - m)
  double sum_exp_sq;  // sum exp(z - m)^2
  double sum_z;       // sum of every logit
  double max_before;  // largest logit left of the label
  double max_after;   // and right of it
};

struct FoldArgs {
  Tile tile;
  const int64_t* labels;  // [num_rows] vocabulary index; outside the tile's columns: none
  double* block_lse;      // [num_rows, blocks of the tile], the label's own logit left out; fp32 lacks digits at 1e4
  int64_t block_lse_stride;
  float* label_logit;  // [num_rows], written by the tile that holds the label
  RowStats* stats;     // [num_rows] or null
};

// Block sums -> lse, logps and statistics.
struct FinishArgs {
  int64_t num_rows;
  int64_t vocab_size;
  const double* rest_lse;    // [num_rows] log-sum-exp of every logit but the label's
  const float* label_logit;  // [num_rows]
  const RowStats* stats;     // or null
  float* logps;              // [num_rows]
  float* lse;                // [num_rows]
  float* entropy;            // [num_rows] or null, as the three below; all need stats
  float* mean_logit;
  uint8_t* is_top1;
  float* log_sum_sq_probs;
};

// Block sums -> the pairs that the backward computes.
struct RouteArgs {
  int64_t num_rows;
  int64_t num_blocks;
  int64_t first_row;        // index of row 0 among all completion tokens: the generator's counter
  const double* block_lse;  // [num_rows, num_blocks]
  const double* rest_lse;   // [num_rows]
  const int64_t* labels;    // [num_rows]
  float tau;
  float second_tau;       // negative: one set of pairs
  uint64_t seed;
  const int64_t* before;  // [2, num_rows] odds of both sets on lower shards, or null
  int64_t* sums;          // [2, num_rows] what this shard adds to them, or null
  uint8_t* bitmap;        // [num_rows, bitmap_stride] one bit per block, then, set_bytes on, those of the smaller set
  int64_t bitmap_stride;
  int64_t set_bytes;
  int32_t* most_pairs;  // [num_rows] most pairs of the first set, whatever the draw
};

// dlogp -> d(raw product), in place of the tile.
struct GradArgs {
  Tile tile;
  const int32_t* tokens;  // [num_rows] index into the per-token arrays below; null: row i is token i
  const int64_t* labels;  // per token
  const float* lse;
  const float* logps;
  const float* coef;          // dL/dlogp
  const float* entropy;       // both null, or both given
  const float* coef_entropy;  // dL/dentropy
};

// The same for one block of kept pairs, weighted by 1 / q. A gradient's set is 0, the larger one that was kept at `tau`,
// 1, the smaller one inside it, or -1: not wanted. Rows of `dz_hidden` are those of its set, compacted.
struct RoutedGradArgs {
  GradArgs grad;
  float tau;
  float second_tau;            // of set 1, if there is one
  const uint8_t* second_bits;  // token 0's byte with this block's bit of set 1, or null
  int64_t bitmap_stride;
  int second_bit;
  int hidden_set;
  int weight_set;
  float* row_weight;       // scratch [2, num_rows], of each set
  float* dz_hidden;        // [num_rows, num_cols] or null: then the tile serves both gradients
  int32_t* hidden_tokens;  // [num_rows] tokens of the rows of dz_hidden
};

constexpr int64_t kLeftOut = -2;     // in `labels` of given logits
constexpr int64_t kPartialFloats = 3;  // of one part of a row in `partials`

// Given logits of any of the three types -> log p of one column per row. On both machines.
struct LogitsForwardArgs {
  const void* logits;  // [num_rows, vocab_size], columns contiguous
  int64_t logits_stride;
  int64_t num_rows;
  int64_t vocab_size;
  const int64_t* labels;  // [num_rows] column; -1: none, lse alone; kLeftOut: the row is not read, its results are 0
  float* logps;           // [num_rows]
  float* lse;             // [num_rows]
  float* entropy;         // [num_rows] or null
  float inv_temperature;
  int64_t splits;   // parts of a row, each walked by a block of threads of its own
  float* partials;  // scratch [num_rows, splits, kPartialFloats]; null where splits is 1
};

struct LogitsBackwardArgs {
  const void* logits;
  int64_t logits_stride;
  int64_t num_rows;
  int64_t vocab_size;
  const int64_t* labels;
  const float* logps;
  const float* lse;
  const float* coef;          // [num_rows] dL/dlogp; 0, and the other too: the row gets zeros and is not read
  const float* entropy;       // both null, or both given
  const float* coef_entropy;  // dL/dentropy
  void* dlogits;      // [num_rows, vocab_size] of the logits' type; may be the logits
  int64_t dlogits_stride;
  float inv_temperature;
  int64_t splits;
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace fastdpo
