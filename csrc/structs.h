// Every struct that crosses from Python to the kernels: pointers, sizes and scalars. No tensor type crosses, so one
// build serves every torch. Sizes and strides count elements and are 64-bit.
//
// `fields` of a struct is the list of the keywords that a Python call gives, all of them; arguments.h reads them.
//   in.numbers(NAMED(x, y))                        numbers
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
#include "shared/preference_loss.h"

#define NAMED(...) #__VA_ARGS__, __VA_ARGS__

namespace fastdpo {

constexpr int64_t kBlock = 128;  // vocabulary columns per block: the unit of routing
constexpr int64_t blocks_of(int64_t num_cols) { return (num_cols + kBlock - 1) / kBlock; }
constexpr int64_t bytes_of(int64_t num_bits) { return (num_bits + 7) / 8; }

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

  template <class In> void fields(In& in) {
    in.matrix(NAMED(data), stride, num_rows, num_cols);
    in.numbers(NAMED(col_start));
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
    tile.fields(in);
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
    in.numbers(NAMED(num_rows, vocab_size, num_threads));
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
    in.numbers(NAMED(first_row, tau, second_tau, seed, num_threads));
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
  }
  // Of `count` tokens or more.
  template <class In> void token_fields(In& in, int64_t count) {
    in.vector(count, NAMED(labels), num_tokens);
    in.arrays(num_tokens, NAMED(lse, logps, coef));
    in.optional(num_tokens, NAMED(entropy, coef_entropy, coef_lse));
    in.require(!entropy == !coef_entropy, "entropy and coef_entropy go together");
  }
};

// A set of pairs whose tokens have a gradient: coef == 0 leaves a token out.
struct PairSet {
  const uint8_t* bitmap;  // [num_tokens, bytes]
  int64_t bitmap_stride;
  const float* coef;  // [num_tokens]
  int64_t first_token, last_token;  // those asked for
  int64_t first_block, num_blocks;
  int num_threads;

  template <class In> void fields(In& in) {
    in.numbers(NAMED(first_token, last_token, first_block, num_blocks, num_threads));
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

  template <class In> void fields(In& in) {
    set.fields(in);
    in.arrays(set.num_blocks + 1, NAMED(offsets));
    in.arrays(0, NAMED(tokens));
  }
};

constexpr int64_t kLeftOut = -2;       // in `labels` of given logits
constexpr int64_t kPartialFloats = 3;  // of one part of a row in `partials`

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
    in.numbers(NAMED(inv_temperature, splits));
  }
};

struct LogitsForwardArgs : LogitsArgs {
  float* partials;  // scratch [num_rows, splits, kPartialFloats]; null where splits is 1

  template <class In> void fields(In& in) {
    LogitsArgs::fields(in);
    in.optional(num_rows * splits * kPartialFloats, NAMED(partials));
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
    in.rows(NAMED(dlogits), dlogits_stride, num_rows, vocab_size);
  }
};

constexpr int kMaxTerms = 24;

struct LossTerm {
  PreferenceLoss loss;
  double weight;
};

// Sequence i of side 0 is the i-th chosen one, of side 1 the i-th rejected one. Padded: [num_pairs, num_tokens] per
// side. Packed (`offsets`): num_tokens in all, sequence s = side * num_pairs + i at [offsets[s], offsets[s + 1]).
// One log-prob per sequence is num_tokens == 1 without labels.
template <class T>
struct PreferenceBatch {
  const T* logps[2];
  const T* ref[2];               // or null: zeros, the loss is reference-free
  const T* kl[2];                // KL(reference || policy), like `logps`; or null
  const T* log_sum_sq_probs[2];  // per token, for WPO's weights; or null
  const int64_t* labels[2];      // or null: every token counts
  const int64_t* lengths[2];     // [num_pairs], where there are no labels; or null: 1
  const void* offsets;           // [2 num_pairs + 1]; or null: padded
  const double* kto_kl;          // or null: the option's number
  int64_t label_stride;          // between padded rows of labels; the other arrays are contiguous
  int64_t ignore_index;
  int64_t num_pairs, num_tokens;
  bool offsets_are_int32, ref_per_token, average, reward_per_token, reward_with_kl;
  double ld_alpha;    // of tokens past the shorter length; negative: none
  double sft_weight;  // of -sum(chosen) / sum(tokens) over the batch, which has no expression per pair
  LossTerm terms[kMaxTerms];
  int num_terms;
  PreferenceOptions options;

  int64_t side_size() const { return offsets ? num_tokens : num_pairs * num_tokens; }
  int64_t ref_size() const { return ref_per_token ? side_size() : num_pairs; }

  // What both ways read; the rest is the forward's alone.
  template <class In> void layout_fields(In& in) {
    in.numbers(NAMED(num_pairs, num_tokens, ignore_index, ref_per_token, average, ld_alpha, sft_weight));
    in.offsets(2 * num_pairs + 1, NAMED(offsets), offsets_are_int32);
    in.pair_of_rows(NAMED(labels), label_stride, offsets ? num_tokens : num_pairs, offsets ? 1 : num_tokens);
  }
  template <class In> void fields(In& in) {
    layout_fields(in);
    in.pairs(side_size(), NAMED(logps, kl, log_sum_sq_probs));
    in.pairs(ref_size(), NAMED(ref));
    in.pairs(num_pairs, NAMED(lengths));
    in.optional(1, NAMED(kto_kl));
    in.numbers(NAMED(reward_per_token, reward_with_kl));
    in.terms(NAMED(terms), num_terms);
    in.options(NAMED(options));
  }
};

struct PairSums {
  double policy[2], ref[2], kl[2];  // as the loss reads them
  double plain_chosen;              // without weights, for sft
  double weight;                    // WPO's
  int64_t tokens[2];
};

constexpr int kPartials = kPreferenceInputs + 1;

template <class T>
struct PreferenceResults {
  PairSums* sums;     // [num_pairs] scratch
  int32_t* finished;  // [1] scratch of a GPU
  T* loss;            // [1]
  T* losses;          // [num_pairs], as the six below
  T* rewards[2];
  T* logps[2];
  double* partials;  // [kPartials, num_pairs]: d losses[i] / d (both of policy, ref and kl; the plain sums)
};

// From log-probs to the loss.
template <class T>
struct PreferenceForwardArgs {
  PreferenceBatch<T> batch;
  PreferenceResults<T> out;

  template <class In> void fields(In& in) {
    batch.fields(in);
    in.arrays(batch.num_pairs, "sums, losses", out.sums, out.losses);
    in.arrays(kPartials * batch.num_pairs, "partials", out.partials);
    in.arrays(1, "loss, finished", out.loss, out.finished);
    in.pairs(batch.num_pairs, "rewards, out_logps", out.rewards, out.logps);
  }
};

template <class T>
struct PreferenceUpstream {
  const double* partials;
  const PairSums* sums;
  const T* dloss;      // [1], or null as the three below
  const T* dlosses;    // [num_pairs]
  const T* dlogps[2];  // [num_pairs], of PreferenceResults::logps
  T* dtokens[2];       // like `logps`, or null as dref
  T* dref[2];          // like `ref`
  T* dkl[2];           // like `logps`
};

// And back.
template <class T>
struct PreferenceBackwardArgs {
  PreferenceBatch<T> batch;
  PreferenceUpstream<T> up;

  template <class In> void fields(In& in) {
    batch.layout_fields(in);
    in.arrays(batch.num_pairs, "sums", up.sums);
    in.arrays(kPartials * batch.num_pairs, "partials", up.partials);
    in.optional(1, "dloss", up.dloss);
    in.optional(batch.num_pairs, "dlosses", up.dlosses);
    in.pairs(batch.num_pairs, "dlogps", up.dlogps);
    in.pairs(batch.side_size(), "dtokens, dkl", up.dtokens, up.dkl);
    in.pairs(batch.ref_size(), "dref", up.dref);
  }
};

}  // namespace fastdpo

#undef NAMED
