// What crosses from Python for the divergence of two heads, in structs.h's manner.
#pragma once

#include "shared/divergence.h"
#include "structs.h"

#define NAMED(...) #__VA_ARGS__, __VA_ARGS__

namespace fastdpo {

// The teacher's products of the tokens and columns of a Tile.
struct RefTile {
  const float* ref_data;  // [num_rows, num_cols]
  int64_t ref_stride;
  const float* ref_bias;  // [num_cols] or null
  LogitTransform ref_transform;

  template <class In> void fields(In& in, const Tile& tile) {
    in.rows(NAMED(ref_data), ref_stride, tile.num_rows, tile.num_cols);
    in.optional(tile.num_cols, NAMED(ref_bias));
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
    tile.fields(in);
    ref.fields(in, tile);
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

  template <class In> void fields(In& in, const GradArgs& grad) {
    ref.fields(in, grad.tile);
    in.arrays(grad.num_tokens, NAMED(ref_lse, coef_divergence));
    in.optional(grad.num_tokens, NAMED(ref_logps, mean, total));
    in.numbers(NAMED(kind, beta, routes_logps));
    in.require(mean || kind == 0, "only forward KL has no mean");
  }
};

struct DivergenceGradArgs {
  GradArgs grad;
  DivergenceTerms terms;

  template <class In> void fields(In& in) {
    grad.fields(in);
    terms.fields(in, grad);
  }
};

struct RoutedDivergenceGradArgs {
  RoutedGradArgs routed;
  DivergenceTerms terms;

  template <class In> void fields(In& in) {
    routed.fields(in);
    terms.fields(in, routed.grad);
    in.require(terms.total, "total is needed");
  }
};

}  // namespace fastdpo

#undef NAMED
