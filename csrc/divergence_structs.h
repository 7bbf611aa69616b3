// What crosses from Python for the divergence of two heads, in structs.h's manner.
#pragma once

#include "head_structs.h"
#include "shared/divergence.h"

#define NAMED(...) #__VA_ARGS__, __VA_ARGS__

namespace fastdpo {

// The teacher's products of the tokens and columns of a Tile.
struct RefTile {
  const float* ref_data;  // [num_rows, num_cols]
  int64_t ref_stride;
  const float* ref_bias;  // [num_cols] or null
  LogitTransform ref_transform;

  // Of a bias for so many columns.
  template <class In> void fields(In& in, int64_t num_rows, int64_t num_cols, int64_t bias_size) {
    in.rows(NAMED(ref_data), ref_stride, num_rows, num_cols);
    in.optional(bias_size, NAMED(ref_bias));
    double temperature = 1.0;
    in.tuple("ref_transform", ref_transform.scale, ref_transform.softcap, temperature);
    ref_transform.inv_temperature = static_cast<float>(1.0 / temperature);
  }
};

struct DivergenceFoldArgs {
  Tile tile;
  RefTile ref;
  const int64_t* labels;  // [num_rows] vocabulary index; outside the tile's columns: none
  double* blocks;         // [num_rows, blocks of the tile] BlockDivergence
  int64_t blocks_stride;
  float *label_logit, *ref_label_logit;  // [num_rows], written by the tile that holds the label
  const double *lse, *ref_lse;           // [num_rows]: JSD's second sweep; or null
  double beta;
  int num_threads;

  template <class In> void fields(In& in) {
    tile.fields(in, true);
    ref.fields(in, tile.num_rows, tile.num_cols, tile.num_cols);
    in.arrays(tile.num_rows, NAMED(labels, label_logit, ref_label_logit));
    in.rows(NAMED(blocks), blocks_stride, tile.num_rows, kBlockDivergenceSize * blocks_of(tile.num_cols));
    in.optional(tile.num_rows, NAMED(lse, ref_lse));
    in.require(!lse == !ref_lse, "lse and ref_lse go together");
    in.numbers(NAMED(beta, num_threads));
  }
  BlockDivergence* block(int64_t row, int64_t i) const {
    return reinterpret_cast<BlockDivergence*>(blocks + row * blocks_stride) + i;
  }
};

// What dz reads of the teacher and of the divergence, beside GradArgs.
struct DivergenceTerms {
  RefTile ref;
  const float *ref_lse, *ref_logps;  // [num_tokens]; the latter null where labels are none
  const float* mean;                 // [num_tokens] or null: forward KL
  const float* coef_divergence;      // [num_tokens]
  const float* total;                // [num_tokens] or null: nothing is routed
  int kind;
  double beta;
  bool routes_logps;

  // Of so many tokens, with those labels.
  template <class In> void fields(In& in, int64_t num_tokens, const int64_t* labels) {
    in.arrays(num_tokens, NAMED(ref_lse, coef_divergence));
    in.optional(num_tokens, NAMED(ref_logps, mean, total));
    in.kind(NAMED(kind), 3);
    in.numbers(NAMED(beta, routes_logps));
    in.require(mean || kind == 0, "only forward KL has no mean");
    const bool any_label = !ref_logps && std::any_of(labels, labels + num_tokens, [](int64_t x) { return x >= 0; });
    in.require(!any_label, "labels need ref_logps");
  }
};

struct DivergenceGradArgs {
  GradArgs grad;
  DivergenceTerms terms;

  template <class In> void fields(In& in) {
    grad.fields(in);
    terms.ref.fields(in, grad.tile.num_rows, grad.tile.num_cols, grad.tile.num_cols);
    terms.fields(in, grad.num_tokens, grad.labels);
  }
};

struct RoutedDivergenceGradArgs {
  RoutedGradArgs routed;
  DivergenceTerms terms;

  template <class In> void fields(In& in) {
    routed.fields(in);
    terms.ref.fields(in, routed.blocks.num_rows, kBlock, routed.blocks.vocab_size);
    terms.fields(in, routed.grad.num_tokens, routed.grad.labels);
    in.require(terms.total, "total is needed");
  }
  RoutedDivergenceGradArgs part(int64_t j, int64_t begin, int64_t end) const {
    RoutedDivergenceGradArgs a = *this;
    a.routed = routed.part(j, begin, end);
    const TileRows rows = routed.blocks.part(j, 1);
    a.terms.ref.ref_data += (rows.offset + begin) * terms.ref.ref_stride;
    if (a.terms.ref.ref_bias) a.terms.ref.ref_bias += rows.column;
    return a;
  }
};

}  // namespace fastdpo

#undef NAMED
