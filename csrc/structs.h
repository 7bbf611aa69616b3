// Every struct that crosses from Python to the kernels: pointers, sizes and scalars. No tensor type crosses, so one build
// serves every torch. Sizes and strides count elements and are 64-bit.
//
// Beside each struct stands `fields`: the names by which Python gives its members, all of them, by keyword alone.
//   v(name, x)                                  a number, or a pointer to a contiguous tensor of that type
//   v(name, pointer, count)                     ... of at least `count` elements
//   v.optional(name, pointer, count)            ... or None, which is null
//   v.rows(name, pointer, stride)               a tensor whose rows are contiguous, with the distance between them
//   v.matrix(name, pointer, stride, rows, cols) ... and with its shape
//   v.pair(name, pointers), v.pair_of_rows(...) two of them, or None: of the chosen side and of the rejected one
#pragma once

#include <cstdint>
#include <limits>

#include "shared/preference_loss.h"

namespace fastdpo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t kBlock = 128;  // vocabulary columns per block: the unit of routing

// z = inv_temperature * softcap * tanh(scale * (product + bias) / softcap); softcap == 0 means none.
struct LogitTransform {
  float scale;
  float softcap;
  float inv_temperature;
};
template <class V>
void fields(V& v, LogitTransform& t) {
  double temperature;
  v.tuple("transform", t.scale, t.softcap, temperature);
  t.inv_temperature = static_cast<float>(1.0 / temperature);
}

// One tile of raw products `hidden @ weight[col_start : col_start + num_cols].T`, fp32, rows contiguous.
struct Tile {
  float* data;  // [num_rows, num_cols]
  int64_t stride;
  int64_t num_rows;
  int64_t num_cols;
  int64_t col_start;  // vocabulary index of the first column; a multiple of kBlock
  const float* bias;  // [num_cols] or null
  LogitTransform transform;
};
template <class V>
void fields(V& v, Tile& t) {
  v.matrix("data", t.data, t.stride, t.num_rows, t.num_cols);
  v("col_start", t.col_start);
  v.optional("bias", t.bias, t.num_cols);
  fields(v, t.transform);
}

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
constexpr const char* kRowStatsNames[] = {"max", "sum_exp", "sum_exp_z", "sum_exp_sq", "sum_z", "max_before", "max_after"};
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
};
template <class V>
void fields(V& v, FoldArgs& a) {
  fields(v, a.tile);
  v("labels", a.labels, a.tile.num_rows);
  v.rows("block_lse", a.block_lse, a.block_lse_stride, a.tile.num_rows);
  v("label_logit", a.label_logit, a.tile.num_rows);
  v.optional("stats", a.stats, a.tile.num_rows);
  v("num_threads", a.num_threads);
}

// [num_rows, num_blocks] -> [num_rows] log-sum-exp.
struct SumBlocksArgs {
  const double* block_lse;
  int64_t stride;
  int64_t num_rows;
  int64_t num_blocks;
  double* rest_lse;
  int num_threads;
};
template <class V>
void fields(V& v, SumBlocksArgs& a) {
  v.matrix("block_lse", a.block_lse, a.stride, a.num_rows, a.num_blocks);
  v("rest_lse", a.rest_lse, a.num_rows);
  v("num_threads", a.num_threads);
}

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
  int num_threads;
};
template <class V>
void fields(V& v, FinishArgs& a) {
  v("num_rows", a.num_rows);
  v("vocab_size", a.vocab_size);
  v("rest_lse", a.rest_lse, a.num_rows);
  v("label_logit", a.label_logit, a.num_rows);
  v.optional("stats", a.stats, a.num_rows);
  v("logps", a.logps, a.num_rows);
  v("lse", a.lse, a.num_rows);
  v.optional("entropy", a.entropy, a.num_rows);
  v.optional("mean_logit", a.mean_logit, a.num_rows);
  v.optional("is_top1", a.is_top1, a.num_rows);
  v.optional("log_sum_sq_probs", a.log_sum_sq_probs, a.num_rows);
  v("num_threads", a.num_threads);
}

// Block sums -> the pairs that the backward computes.
struct RouteArgs {
  const double* block_lse;  // [num_rows, num_blocks]
  int64_t stride;
  int64_t num_rows;
  int64_t num_blocks;
  int64_t first_row;       // index of row 0 among all completion tokens: the generator's counter
  const double* rest_lse;  // [num_rows]
  const int64_t* labels;   // [num_rows]
  float tau;
  float second_tau;  // negative: one set of pairs
  uint64_t seed;
  const int64_t* before;  // [2, num_rows] odds of both sets on lower shards, or null
  int64_t* sums;          // [2, num_rows] what this shard adds to them, or null
  uint8_t* bitmap;        // [num_rows, bitmap_stride] one bit per block, then, set_bytes on, those of the smaller set
  int64_t bitmap_stride;
  int64_t set_bytes;
  int32_t* most_pairs;  // [num_rows] most pairs of the first set, whatever the draw
  int num_threads;
};
template <class V>
void fields(V& v, RouteArgs& a) {
  v.matrix("block_lse", a.block_lse, a.stride, a.num_rows, a.num_blocks);
  v("first_row", a.first_row);
  v("rest_lse", a.rest_lse, a.num_rows);
  v("labels", a.labels, a.num_rows);
  v("tau", a.tau);
  v("second_tau", a.second_tau);
  v("seed", a.seed);
  v.optional("before", a.before, 2 * a.num_rows);
  v.optional("sums", a.sums, 2 * a.num_rows);
  v.rows("bitmap", a.bitmap, a.bitmap_stride, a.num_rows);
  a.set_bytes = (a.num_blocks + 7) / 8;
  v("most_pairs", a.most_pairs, a.num_rows);
  v("num_threads", a.num_threads);
}

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
  int num_threads;
};
template <class V>
void fields(V& v, GradArgs& a) {
  fields(v, a.tile);
  v.optional("tokens", a.tokens, a.tile.num_rows);
  const int64_t count = a.tokens ? 0 : a.tile.num_rows;
  v("labels", a.labels, count);
  v("lse", a.lse, count);
  v("logps", a.logps, count);
  v("coef", a.coef, count);
  v.optional("entropy", a.entropy, count);
  v.optional("coef_entropy", a.coef_entropy, count);
  v("num_threads", a.num_threads);
}

// The same for one block of kept pairs, weighted by 1 / q. A gradient's set is 0, the larger one that was kept at `tau`,
// 1, the smaller one inside it, or -1: not wanted. Rows of `dz_hidden` are those of its set, compacted.
struct RoutedGradArgs {
  GradArgs grad;
  float tau;
  float second_tau;            // of set 1, if there is one
  const uint8_t* second_bits;  // [tokens, bytes] of set 1, or null
  int64_t bitmap_stride;
  int hidden_set;
  int weight_set;
  float* row_weight;       // scratch [2, num_rows], of each set
  float* dz_hidden;        // [num_rows, num_cols] or null: then the tile serves both gradients
  int32_t* hidden_tokens;  // [num_rows] tokens of the rows of dz_hidden
};
template <class V>
void fields(V& v, RoutedGradArgs& a) {
  fields(v, a.grad);
  v("tau", a.tau);
  v("second_tau", a.second_tau);
  v.optional_rows("second_bits", a.second_bits, a.bitmap_stride);
  v("hidden_set", a.hidden_set);
  v("weight_set", a.weight_set);
  v("row_weight", a.row_weight, 2 * a.grad.tile.num_rows);
  v.optional("dz_hidden", a.dz_hidden, a.grad.tile.num_rows * a.grad.tile.num_cols);
  v.optional("hidden_tokens", a.hidden_tokens, a.grad.tile.num_rows);
}

// A set of pairs -> per block, the tokens that kept it. Tokens with coef == 0 have no gradient and are left out.
struct CountPairsArgs {
  const uint8_t* bitmap;  // [num_tokens, bytes]
  int64_t bitmap_stride;
  const float* coef;  // [num_tokens]
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t* counts;  // [num_blocks]
  int num_threads;
};
template <class V>
void fields(V& v, CountPairsArgs& a) {
  v("num_tokens", a.num_tokens);
  v("num_blocks", a.num_blocks);
  v.rows("bitmap", a.bitmap, a.bitmap_stride, a.num_tokens);
  v("coef", a.coef, a.num_tokens);
  v("counts", a.counts, a.num_blocks);
  v("num_threads", a.num_threads);
}

struct FillPairsArgs {
  const uint8_t* bitmap;  // of all tokens, as coef
  int64_t bitmap_stride;
  const float* coef;
  int64_t first_token, num_tokens;
  int64_t first_block, num_blocks;
  const int64_t* offsets;  // [num_blocks + 1]
  int32_t* tokens;         // ascending inside a block, whatever the threads
  int num_threads;
};
template <class V>
void fields(V& v, FillPairsArgs& a) {
  v("first_token", a.first_token);
  v("num_tokens", a.num_tokens);
  v("first_block", a.first_block);
  v("num_blocks", a.num_blocks);
  v.rows("bitmap", a.bitmap, a.bitmap_stride, a.first_token + a.num_tokens);
  v("coef", a.coef, a.first_token + a.num_tokens);
  v("offsets", a.offsets, a.num_blocks + 1);
  v("tokens", a.tokens);
  v("num_threads", a.num_threads);
}

// out[i] = float(source[rows[tokens[i]]]); either list may be null: every row.
struct GatherArgs {
  float* out;  // [num_rows, num_cols]
  int64_t out_stride, num_rows, num_cols;
  const void* source;
  int64_t source_stride;
  DType dtype;
  const int32_t* tokens;
  const int64_t* rows;
  int num_threads;
};
template <class V>
void fields(V& v, GatherArgs& a) {
  v.matrix("out", a.out, a.out_stride, a.num_rows, a.num_cols);
  v.any_rows("source", a.source, a.source_stride, a.dtype);
  v.optional("tokens", a.tokens, a.num_rows);
  v.optional("rows", a.rows);
  v("num_threads", a.num_threads);
}

// out[tokens[i] - first_token] += source[i]
struct ScatterArgs {
  float* out;
  int64_t out_stride;
  const float* source;  // [num_rows, num_cols]
  int64_t source_stride, num_rows, num_cols;
  const int32_t* tokens;
  int64_t first_token;
};
template <class V>
void fields(V& v, ScatterArgs& a) {
  v.rows("out", a.out, a.out_stride);
  v.matrix("source", a.source, a.source_stride, a.num_rows, a.num_cols);
  v("tokens", a.tokens, a.num_rows);
  v("first_token", a.first_token);
}

constexpr int64_t kLeftOut = -2;       // in `labels` of given logits
constexpr int64_t kPartialFloats = 3;  // of one part of a row in `partials`

// Given logits of any of the three types -> log p of one column per row. On both machines.
struct LogitsForwardArgs {
  const void* logits;  // [num_rows, vocab_size], columns contiguous
  int64_t logits_stride;
  int64_t num_rows;
  int64_t vocab_size;
  DType dtype;
  const int64_t* labels;  // [num_rows] column; -1: none, lse alone; kLeftOut: the row is not read, its results are 0
  float* logps;           // [num_rows]
  float* lse;             // [num_rows]
  float* entropy;         // [num_rows] or null
  float inv_temperature;
  int64_t splits;   // parts of a row, each walked by a block of threads of its own
  float* partials;  // scratch [num_rows, splits, kPartialFloats]; null where splits is 1
};
template <class V>
void fields(V& v, LogitsForwardArgs& a) {
  v.any_matrix("logits", a.logits, a.logits_stride, a.num_rows, a.vocab_size, a.dtype);
  v("labels", a.labels, a.num_rows);
  v("logps", a.logps, a.num_rows);
  v("lse", a.lse, a.num_rows);
  v.optional("entropy", a.entropy, a.num_rows);
  v("inv_temperature", a.inv_temperature);
  v("splits", a.splits);
  v.optional("partials", a.partials, a.num_rows * a.splits * kPartialFloats);
}

struct LogitsBackwardArgs {
  const void* logits;
  int64_t logits_stride;
  int64_t num_rows;
  int64_t vocab_size;
  DType dtype;
  const int64_t* labels;
  const float* logps;
  const float* lse;
  const float* coef;          // [num_rows] dL/dlogp; 0, and the other too: the row gets zeros and is not read
  const float* entropy;       // both null, or both given
  const float* coef_entropy;  // dL/dentropy
  void* dlogits;              // [num_rows, vocab_size] of the logits' type; may be the logits
  int64_t dlogits_stride;
  float inv_temperature;
  int64_t splits;
};
template <class V>
void fields(V& v, LogitsBackwardArgs& a) {
  v.any_matrix("logits", a.logits, a.logits_stride, a.num_rows, a.vocab_size, a.dtype);
  v("labels", a.labels, a.num_rows);
  v("logps", a.logps, a.num_rows);
  v("lse", a.lse, a.num_rows);
  v("coef", a.coef, a.num_rows);
  v.optional("entropy", a.entropy, a.num_rows);
  v.optional("coef_entropy", a.coef_entropy, a.num_rows);
  v.same_rows("dlogits", a.dlogits, a.dlogits_stride, a.dtype);
  v("inv_temperature", a.inv_temperature);
  v("splits", a.splits);
}

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
  const T* log_sum_sq_probs[2];  // per token, for WPO's weights; or null
  const int64_t* labels[2];      // or null: every token counts
  const int64_t* lengths[2];     // [num_pairs], where there are no labels; or null: 1
  const void* offsets;           // [2 num_pairs + 1]; or null: padded
  const double* kto_kl;          // or null: the option's number
  int64_t label_stride;          // between padded rows of labels; the other arrays are contiguous
  int64_t ignore_index;
  int64_t num_pairs, num_tokens;
  bool offsets_are_int32, ref_per_token, average, reward_per_token;
  double ld_alpha;    // of tokens past the shorter length; negative: none
  double sft_weight;  // of -sum(chosen) / sum(tokens) over the batch, which has no expression per pair
  LossTerm terms[kMaxTerms];
  int num_terms;
  PreferenceOptions options;
};
// What both ways read; `logps` and the rest are the forward's alone.
template <class V, class T>
void layout_fields(V& v, PreferenceBatch<T>& a) {
  v("num_pairs", a.num_pairs);
  v("num_tokens", a.num_tokens);
  v.pair_of_rows("labels", a.labels, a.label_stride);
  v.offsets("offsets", a.offsets, a.offsets_are_int32);
  v("ignore_index", a.ignore_index);
  v("ref_per_token", a.ref_per_token);
  v("average", a.average);
  v("ld_alpha", a.ld_alpha);
  v("sft_weight", a.sft_weight);
}

struct PairSums {
  double policy[2], ref[2];  // as the loss reads them
  double plain_chosen;       // without weights, for sft
  double weight;             // WPO's
  int64_t tokens[2];
};

template <class T>
struct PreferenceResults {
  PairSums* sums;     // [num_pairs] scratch
  int32_t* finished;  // [1] scratch of a GPU
  T* loss;            // [1]
  T* losses;          // [num_pairs], as the six below
  T* rewards[2];
  T* logps[2];
  double* partials;  // [5, num_pairs]: d losses[i] / d (chosen, rejected, ref_chosen, ref_rejected, plain sums)
};

// From log-probs to the loss.
template <class T>
struct PreferenceForwardArgs {
  PreferenceBatch<T> batch;
  PreferenceResults<T> out;
};
template <class V, class T>
void fields(V& v, PreferenceForwardArgs<T>& a) {
  PreferenceBatch<T>& b = a.batch;
  layout_fields(v, b);
  v.pair("logps", b.logps);
  v.pair("ref", b.ref);
  v.pair("log_sum_sq_probs", b.log_sum_sq_probs);
  v.pair("lengths", b.lengths);
  v.optional("kto_kl", b.kto_kl, 1);
  v("reward_per_token", b.reward_per_token);
  v.terms("terms", b.terms, b.num_terms);
  v.options("options", b.options);
  v("sums", a.out.sums, b.num_pairs);
  v("finished", a.out.finished, 1);
  v("loss", a.out.loss, 1);
  v("losses", a.out.losses, b.num_pairs);
  v.pair("rewards", a.out.rewards, b.num_pairs);
  v.pair("out_logps", a.out.logps, b.num_pairs);
  v("partials", a.out.partials, 5 * b.num_pairs);
}

template <class T>
struct PreferenceUpstream {
  const double* partials;
  const PairSums* sums;
  const T* dloss;      // [1], or null as the three below
  const T* dlosses;    // [num_pairs]
  const T* dlogps[2];  // [num_pairs], of PreferenceResults::logps
  T* dtokens[2];       // like `logps`, or null as dref
  T* dref[2];          // like `ref`
};

// And back.
template <class T>
struct PreferenceBackwardArgs {
  PreferenceBatch<T> batch;
  PreferenceUpstream<T> up;
};
template <class V, class T>
void fields(V& v, PreferenceBackwardArgs<T>& a) {
  PreferenceUpstream<T>& up = a.up;
  layout_fields(v, a.batch);
  v("partials", up.partials, 5 * a.batch.num_pairs);
  v("sums", up.sums, a.batch.num_pairs);
  v.optional("dloss", up.dloss, 1);
  v.optional("dlosses", up.dlosses, a.batch.num_pairs);
  v.pair("dlogps", up.dlogps, a.batch.num_pairs);
  v.pair("dtokens", up.dtokens);
  v.pair("dref", up.dref);
}

}  // namespace fastdpo
