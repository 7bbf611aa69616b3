// What crosses from Python for the products of a head with its tokens, in structs.h's manner.
#pragma once

#include <algorithm>
#include <utility>

#include "structs.h"

#define NAMED(...) #__VA_ARGS__, __VA_ARGS__

namespace fastdpo {

// Rows of a factor, of any of three types, `stride` apart; read as fp32, rounded to `rounded` on the way.
struct Factor {
  const void* data;
  int64_t stride, num_cols;
  DType dtype, rounded;

  int64_t size() const { return dtype == DType::kFloat32 ? 4 : 2; }  // bytes of an element
  const char* at(int64_t row, int64_t col) const {
    return static_cast<const char*>(data) + (row * stride + col) * size();
  }
};

// The factor of tokens: that of token i is row `rows[i - first]`, or i - first without a list.
struct TokenFactor : Factor {
  const int64_t* rows;
  int64_t first;

  const char* of(int64_t token, int64_t col) const { return at(rows ? rows[token - first] : token - first, col); }
};

// Rows of a tile whose columns are neighbours in the vocabulary.
struct TileRows {
  float* data;
  int64_t count;
  const int32_t* tokens;  // [count] or null: from `first_token` on
  int64_t first_token;
  int64_t column, width;  // of the vocabulary
  int64_t offset;         // of the first row in the tile

  int64_t token(int64_t row) const { return tokens ? tokens[row] : first_token + row; }
};

// Numbers from `first` on, before `end`.
struct Between {
  int64_t first, end;

  bool has(int64_t x) const { return x >= first && x < end; }
};

// A tile of logits or dz. Row i of block j is that of token tokens[i], for i from offsets[j] on, at `data + i * stride`.
// Without lists every block has all rows, for tokens from `first_token` on, and blocks lie side by side: several can be
// taken together.
struct BlockTile {
  float* data;
  int64_t stride, num_rows, num_cols;
  int64_t first_block, num_blocks, first_token, vocab_size;
  const int32_t* blocks;   // [num_blocks], with the two below, or null
  const int64_t* offsets;  // [num_blocks + 1]
  const int32_t* tokens;   // [num_rows] ascending inside a block

  template <class In> void fields(In& in) {
    in.matrix(NAMED(data), stride, num_rows, num_cols);
    in.sizes(NAMED(first_block, num_blocks, first_token, vocab_size));
    in.optional(num_blocks, NAMED(blocks));
    in.optional(num_blocks + 1, NAMED(offsets));
    in.optional(num_rows, NAMED(tokens));
    in.require(!blocks == !offsets && !blocks == !tokens, "blocks, offsets and tokens go together");
    in.require(num_cols >= (blocks ? kBlock : num_blocks * kBlock), "the tile is too narrow for its blocks");
    if (blocks) lists_fields(in);
    const int64_t last = blocks ? (num_blocks > 0 ? blocks[num_blocks - 1] : -1) : first_block + num_blocks - 1;
    in.require_value(num_blocks == 0 || last < blocks_of(vocab_size), "blocks must be of the vocabulary");
  }
  // Blocks ascend, so that none is two threads' at once, and the tokens of one, which are looked up by bisection.
  template <class In> void lists_fields(In& in) {
    require_offsets(in, offsets, num_blocks, num_rows);
    bool ascending = true;
    for (int64_t j = 0; j < num_blocks; ++j) {
      ascending &= blocks[j] >= 0 && (j == 0 || blocks[j - 1] < blocks[j]);
      for (int64_t i = offsets[j] + 1; i < offsets[j + 1]; ++i) ascending &= tokens[i - 1] < tokens[i];
    }
    in.require_value(ascending, "blocks, and the tokens of a block, must ascend");
  }
  // Those of the rows that are read; of lists [0, 0) where there are none.
  Between token_range() const {
    if (!blocks) return {first_token, first_token + (num_blocks > 0 ? num_rows : 0)};
    Between all = {INT32_MAX, 0};
    for (int64_t j = 0; j < num_blocks; ++j) {
      if (offsets[j] == offsets[j + 1]) continue;
      all.first = std::min<int64_t>(all.first, tokens[offsets[j]]);
      all.end = std::max<int64_t>(all.end, tokens[offsets[j + 1] - 1] + int64_t{1});
    }
    return all.end == 0 && all.first == INT32_MAX ? Between{0, 0} : all;
  }
  // Columns of the vocabulary, of which a caller's rows are written.
  Between column_range() const {
    if (num_blocks == 0) return {0, 0};
    const int64_t first = blocks ? blocks[0] : first_block, last = blocks ? blocks[num_blocks - 1] : first + num_blocks - 1;
    return {first * kBlock, std::min((last + 1) * kBlock, vocab_size)};
  }
  // ValueError where a token that is read is none of those.
  template <class In> void require_tokens(In& in, Between allowed, const char* what) const {
    const Between read = token_range();
    in.require_value(read.first >= read.end || (read.first >= allowed.first && read.end <= allowed.end), what);
  }
  // In how many parts of at most `together` blocks it can be taken, and part j of them.
  int64_t parts(int64_t together) const { return blocks ? num_blocks : (num_blocks + together - 1) / together; }
  TileRows part(int64_t j, int64_t together) const {
    const int64_t column = (blocks ? blocks[j] : first_block + j * together) * kBlock;
    const int64_t left = (blocks ? column + kBlock : (first_block + num_blocks) * kBlock);
    const int64_t most = column + (blocks ? 1 : together) * kBlock, end = left < most ? left : most;
    const int64_t width = (end < vocab_size ? end : vocab_size) - column;
    if (!blocks) return {data + j * together * kBlock, num_rows, nullptr, first_token, column, width, 0};
    const int64_t first = offsets[j];
    return {data + first * stride, offsets[j + 1] - first, tokens + first, first_token, column, width, first};
  }
};

// ValueError where a token that is read has no row among a factor's `num_rows`; `num_listed` are in its list.
template <class In>
void require_rows(In& in, const BlockTile& tile, const TokenFactor& factor, int64_t num_rows, int64_t num_listed) {
  constexpr const char* kWhat = "tokens must be of the factor's rows";
  tile.require_tokens(in, {factor.first, factor.first + (factor.rows ? num_listed : num_rows)}, kWhat);
  if (!factor.rows) return;
  const Between read = tile.token_range(), rows = {0, num_rows};
  bool within = true;
  for (int64_t token = read.first; token < read.end; ++token) within &= rows.has(factor.rows[token - factor.first]);
  in.require_value(within, "source_rows must be of the factor's rows");
}

// The list of a factor's rows, if it has one, and how many are in it.
template <class In>
int64_t listed(In& in, TokenFactor& factor) {
  int64_t size = 0;
  in.optional_vector("source_rows", factor.rows, size);
  return size;
}

// dlogp -> d(raw product), in place of the tile's kept pairs, weighted by 1 / q. A gradient's set is 0, the larger one
// that was kept at `tau`, 1, the smaller one inside it, or -1: not wanted.
struct RoutedGradArgs {
  BlockTile blocks;
  GradArgs grad;               // its tile and tokens are those of one block's rows when a kernel is called
  float tau, second_tau;       // the latter of set 1, if there is one
  const uint8_t* second_bits;  // [num_tokens, bytes] of set 1, or null
  int64_t bitmap_stride;
  int hidden_set, weight_set;
  float* hidden_weight;  // [num_rows], 0 where the pair is not in that set
  float* columns_weight;
  float* dz_hidden;  // [num_rows, kBlock], or null: then the tile serves both gradients
  int64_t dz_hidden_stride;

  template <class In> void fields(In& in) {
    blocks.fields(in);
    in.numbers(NAMED(tau, second_tau, hidden_set, weight_set));
    in.optional(blocks.vocab_size, "bias", grad.tile.bias);
    grad.tile.transform.fields(in);
    grad.token_fields(in, 0);
    in.optional_rows(NAMED(second_bits), bitmap_stride, grad.num_tokens, bytes_of(blocks_of(blocks.vocab_size)));
    in.arrays(blocks.num_rows, NAMED(hidden_weight, columns_weight));
    in.optional_rows(NAMED(dz_hidden), dz_hidden_stride, blocks.num_rows, kBlock);
    in.numbers("num_threads", grad.num_threads);
    const int largest_set = hidden_set > weight_set ? hidden_set : weight_set;
    in.require(blocks.tokens, "tokens of blocks are needed");
    blocks.require_tokens(in, {0, grad.num_tokens}, "tokens must be of the arrays that they index");
    in.require(largest_set == 0 || (largest_set == 1 && second_bits), "set 0 is needed, or set 1 with its second_bits");
    in.require(!dz_hidden || (hidden_set >= 0 && weight_set >= 0), "dz_hidden is of two sets");
  }
  // Rows [begin, end) of block j.
  RoutedGradArgs part(int64_t j, int64_t begin, int64_t end) const {
    RoutedGradArgs a = *this;
    const TileRows rows = blocks.part(j, 1);
    const int64_t start = rows.offset + begin;
    a.grad.tile.data = rows.data + begin * blocks.stride;
    a.grad.tile.stride = blocks.stride;
    a.grad.tile.num_rows = end - begin;
    a.grad.tile.num_cols = rows.width;
    a.grad.tile.col_start = rows.column;
    if (a.grad.tile.bias) a.grad.tile.bias += rows.column;
    a.grad.tokens = rows.tokens + begin;
    a.hidden_weight += start, a.columns_weight += start;
    if (a.dz_hidden) a.dz_hidden += start * dz_hidden_stride;
    return a;
  }
};

// Whether a library can be told of such rows: its numbers have 32 bits.
inline bool fits_a_library(int64_t stride, int64_t num_rows, int64_t num_cols) {
  return (stride >= num_cols || num_rows <= 1) && stride <= INT32_MAX && num_rows <= INT32_MAX && num_cols <= INT32_MAX;
}

// How factors are multiplied: both in fp32 and by csrc, in bf16 and by csrc, or by a library in bf16, rows of lists alone.
// What csrc adds to gradients it does not round: its units are twice as fast, a library's six times.
enum class Product : int { kFloat32 = 0, kBf16 = 1, kBf16Library = 2 };

// `fits`: a library can be told of the factors' rows. `adds`: to gradients.
template <class In>
void product_field(In& in, Product& product, const BlockTile& tile, const Factor& factor, bool fits, bool adds) {
  int id = 0;
  in.kind("product", id, 3);
  product = static_cast<Product>(id);
  in.require(product == Product::kFloat32 || factor.rounded == DType::kBFloat16, "a product in bf16 is of factors rounded to it");
  in.require(product != Product::kBf16 || !adds, "csrc adds to gradients in fp32");
  fits = fits && factor.dtype == DType::kBFloat16 && tile.blocks && fits_a_library(tile.stride, tile.num_rows, kBlock);
  in.require(product != Product::kBf16Library || fits, "a library's product is of lists and of bf16");
}

// tile = hidden @ weight.T, plus low_rank @ lora_b.T.
struct ProductsArgs {
  BlockTile tile;
  TokenFactor hidden, low_rank;  // the latter of fp32, or null as lora_b is
  Factor weight, lora_b;
  Product product;
  int num_threads;

  template <class In> void fields(In& in) {
    tile.fields(in);
    in.dtype_of("weight", weight.dtype);
    int64_t num_rows = 0, num_tokens = 0, num_low_rank = 0;
    in.matrix("weight", weight.data, weight.stride, num_rows, weight.num_cols);
    in.require(num_rows >= tile.vocab_size, "weight has fewer rows than the vocabulary");
    in.dtype_of("hidden", hidden.dtype);
    in.matrix("hidden", hidden.data, hidden.stride, num_tokens, hidden.num_cols);
    in.require(hidden.num_cols == weight.num_cols, "hidden has other columns than the weight");
    require_rows(in, tile, hidden, num_tokens, listed(in, hidden));
    const float *products = nullptr, *b = nullptr;
    in.optional_matrix("low_rank", products, low_rank.stride, num_low_rank, low_rank.num_cols);
    in.sizes("rank, low_rank_first", lora_b.num_cols, low_rank.first);
    in.optional_rows("lora_b", b, lora_b.stride, tile.vocab_size, lora_b.num_cols);
    in.require(!products == !b, "low_rank and lora_b go together");
    low_rank.data = products, lora_b.data = b;
    in.require(!products || low_rank.num_cols == lora_b.num_cols, "low_rank has another rank");
    if (products) require_rows(in, tile, low_rank, num_low_rank, 0);
    in.numbers(NAMED(num_threads));
    in.type_id("rounded", weight.rounded);
    hidden.rounded = weight.rounded;
    const bool fits = hidden.dtype == weight.dtype && fits_a_library(weight.stride, num_rows, weight.num_cols);
    product_field(in, product, tile, weight, fits, false);
  }
};

// out[token - out_first] += dz @ factor, over the blocks in their order.
struct AddToTokensArgs {
  BlockTile tile;
  const float* row_weight;  // [num_rows] or null: rows of weight 0 are left out
  Factor factor;            // of the vocabulary's columns
  float* out;  // [tokens, num_cols]
  int64_t out_stride, out_first, num_tokens;
  Product product;
  int num_threads;

  template <class In> void fields(In& in) {
    tile.fields(in);
    in.optional(tile.num_rows, NAMED(row_weight));
    in.dtype_of("factor", factor.dtype);
    int64_t num_rows = 0, columns = 0;
    in.matrix("factor", factor.data, factor.stride, num_rows, factor.num_cols);
    in.require(num_rows >= tile.vocab_size, "factor has fewer rows than the vocabulary");
    in.matrix(NAMED(out), out_stride, num_tokens, columns);
    in.require(columns == factor.num_cols, "out has other columns than the factor");
    in.sizes(NAMED(out_first));
    in.numbers(NAMED(num_threads));
    tile.require_tokens(in, {out_first, out_first + num_tokens}, "tokens must have rows in out");
    in.type_id("rounded", factor.rounded);
    product_field(in, product, tile, factor, fits_a_library(factor.stride, num_rows, factor.num_cols), true);
  }
};

// out[column - out_first] += dz.T @ factor, or = if `fresh`, and bias[column] += the sum of dz; either may be null.
struct AddToColumnsArgs {
  BlockTile tile;
  TokenFactor factor;
  void* out;  // [columns, num_cols]
  int64_t out_stride, out_first;
  DType out_type;
  bool fresh;   // nothing is in `out` yet
  float* bias;  // [vocab_size]
  Product product;
  int num_threads;

  template <class In> void fields(In& in) {
    tile.fields(in);
    in.dtype_of("factor", factor.dtype);
    int64_t num_rows = 0;
    in.matrix("factor", factor.data, factor.stride, num_rows, factor.num_cols);
    in.sizes("factor_first, out_first", factor.first, out_first);
    require_rows(in, tile, factor, num_rows, listed(in, factor));
    in.dtype_of("out", out_type);
    int64_t out_rows = 0, out_cols = 0;
    in.optional_matrix(NAMED(out), out_stride, out_rows, out_cols);
    in.require(!out || out_cols == factor.num_cols, "out has other columns than the factor");
    const Between written = tile.column_range();
    const bool inside = written.first >= out_first && written.end <= out_first + out_rows;
    in.require_value(!out || written.first >= written.end || inside, "blocks must have rows in out");
    in.optional(tile.vocab_size, NAMED(bias));
    in.numbers(NAMED(fresh, num_threads));
    in.type_id("rounded", factor.rounded);
    product_field(in, product, tile, factor, true, true);
  }
};

// A side of a product of bf16, as it is or `turned`: its transpose; and where the product goes.
struct Bf16Rows {
  const void* data;
  int64_t stride;
  bool turned;
};
struct Bf16Sums {
  float* data;
  int64_t stride;
  bool add;
};

// out [n, m] = a @ b.T, or +=, of a [n, k] and b [m, k].
struct Bf16ProductArgs {
  Bf16Rows a, b;
  Bf16Sums out;
  int64_t n, m, k;

  template <class In> void fields(In& in) {
    int64_t out_rows = 0, out_cols = 0, other_k = 0;
    in.numbers("add", out.add);
    side(in, "a", "a_turned", a, n, k);
    side(in, "b", "b_turned", b, m, other_k);
    in.matrix("out", out.data, out.stride, out_rows, out_cols);
    in.require(k == other_k, "a and b have sums of different lengths");
    in.require(out_rows == n && out_cols == m, "out has another shape than the product");
    in.require(fits_a_library(out.stride, n, m), "rows of out overlap, or are too far apart");
  }
  template <class In> void side(In& in, const char* name, const char* turned, Bf16Rows& x, int64_t& rows, int64_t& cols) {
    DType type = {};
    in.numbers(turned, x.turned);
    in.dtype_of(name, type);
    in.matrix(name, x.data, x.stride, rows, cols);
    in.require(type == DType::kBFloat16, "a and b must be bf16");
    in.require(fits_a_library(x.stride, rows, cols), "rows of a or b overlap, or are too far apart");
    if (x.turned) std::swap(rows, cols);
  }
};

// Memory that was just allocated, and not yet touched.
struct MemoryArgs {
  const void* data;
  int64_t stride, num_rows, num_cols;
  DType dtype;

  template <class In> void fields(In& in) {
    in.dtype_of("data", dtype);
    in.matrix(NAMED(data), stride, num_rows, num_cols);
  }
};

}  // namespace fastdpo

#undef NAMED
