// The CPU's products and folds against plain loops in double: what a processor that Python's tests cannot run on compiles.
// Exit status 0 where everything agrees.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu/folds.h"
#include "cpu/parallel.h"

using namespace fastdpo;

namespace {

int failures = 0;

void check(double found, double expected, double tolerance, const char* what) {
  if (std::fabs(found - expected) <= tolerance * (1 + std::fabs(expected))) return;
  std::printf("%s: %.9g instead of %.9g\n", what, found, expected);
  ++failures;
}

float draw() { return static_cast<float>(std::rand() % 2001 - 1000) / 1000.0f; }

std::vector<float> drawn(int64_t count) {
  std::vector<float> x(count);
  for (float& value : x) value = draw();
  return x;
}

// Bits of bf16 in place of x, which is rounded too.
std::vector<BFloat16> rounded(std::vector<float>& x) {
  std::vector<BFloat16> bits(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    from_float(x[i], &bits[i]);
    x[i] = to_float(bits[i]);
  }
  return bits;
}

void test(int64_t num_tokens, int64_t vocab_size, int64_t size, bool halves, int threads) {
  std::vector<float> hidden = drawn(num_tokens * size), weight = drawn(vocab_size * size);
  const std::vector<BFloat16> hidden_bits = halves ? rounded(hidden) : std::vector<BFloat16>();
  const std::vector<BFloat16> weight_bits = halves ? rounded(weight) : std::vector<BFloat16>();
  const DType type = halves ? DType::kBFloat16 : DType::kFloat32;
  const void* x = halves ? static_cast<const void*>(hidden_bits.data()) : hidden.data();
  const void* y = halves ? static_cast<const void*>(weight_bits.data()) : weight.data();
  const int64_t blocks = blocks_of(vocab_size), stride = blocks * kBlock + 16;
  std::vector<float> logits(num_tokens * stride);

  ProductsArgs products_args = {};
  BlockTile& tile = products_args.tile;
  tile = {logits.data(), stride, num_tokens, blocks * kBlock, 0, blocks, 0, vocab_size, nullptr, nullptr, nullptr};
  products_args.hidden = {{x, size, size, type, DType::kFloat32}, nullptr, 0};
  products_args.weight = {y, size, size, type, DType::kFloat32};
  products_args.num_threads = threads;
  products(products_args);
  std::vector<double> exact(num_tokens * vocab_size);
  for (int64_t i = 0; i < num_tokens; ++i)
    for (int64_t j = 0; j < vocab_size; ++j) {
      for (int64_t k = 0; k < size; ++k) exact[i * vocab_size + j] += double(hidden[i * size + k]) * weight[j * size + k];
      check(logits[i * stride + j], exact[i * vocab_size + j], 1e-4, "product");
    }

  std::vector<int64_t> labels(num_tokens);
  std::vector<double> block_lse(num_tokens * blocks), rest_lse(num_tokens);
  std::vector<float> label_logit(num_tokens), logps(num_tokens), lse(num_tokens), coef(num_tokens, 1.0f);
  for (int64_t i = 0; i < num_tokens; ++i) labels[i] = (i * 37) % vocab_size;
  FoldArgs fold_args = {};
  fold_args.tile = {logits.data(), stride, num_tokens, vocab_size, 0, nullptr, {1.0f, 0.0f, 1.0f}};
  fold_args.labels = labels.data(), fold_args.block_lse = block_lse.data(), fold_args.block_lse_stride = blocks;
  fold_args.label_logit = label_logit.data(), fold_args.num_threads = threads;
  fold(fold_args);
  sum_blocks({block_lse.data(), blocks, num_tokens, blocks, rest_lse.data(), threads});
  FinishArgs finish_args = {};
  finish_args.num_rows = num_tokens, finish_args.vocab_size = vocab_size, finish_args.rest_lse = rest_lse.data();
  finish_args.label_logit = label_logit.data(), finish_args.logps = logps.data(), finish_args.lse = lse.data();
  finish_args.num_threads = threads;
  finish(finish_args);
  std::vector<double> exact_lse(num_tokens);
  for (int64_t i = 0; i < num_tokens; ++i) {
    for (int64_t j = 0; j < vocab_size; ++j) exact_lse[i] += std::exp(exact[i * vocab_size + j]);
    exact_lse[i] = std::log(exact_lse[i]);
    check(lse[i], exact_lse[i], 1e-5, "lse");
    check(logps[i], exact[i * vocab_size + labels[i]] - exact_lse[i], 1e-5, "logp");
  }

  GradArgs grad_args = {};
  grad_args.tile = fold_args.tile, grad_args.labels = labels.data(), grad_args.lse = lse.data();
  grad_args.logps = logps.data(), grad_args.coef = coef.data(), grad_args.num_tokens = num_tokens;
  grad_args.num_threads = threads;
  grad(grad_args);
  std::vector<float> dhidden(num_tokens * size), dweight(vocab_size * size), dbias(vocab_size);
  AddToTokensArgs to_tokens = {};
  to_tokens.tile = tile, to_tokens.factor = products_args.weight, to_tokens.out = dhidden.data();
  to_tokens.out_stride = size, to_tokens.num_tokens = num_tokens, to_tokens.num_threads = threads;
  add_to_tokens(to_tokens);
  AddToColumnsArgs to_columns = {};
  to_columns.tile = tile, to_columns.factor = products_args.hidden, to_columns.out = dweight.data();
  to_columns.out_stride = size, to_columns.out_type = DType::kFloat32, to_columns.bias = dbias.data();
  to_columns.num_threads = threads;
  add_to_columns(to_columns);
  std::vector<double> exact_dhidden(dhidden.size()), exact_dweight(dweight.size()), exact_dbias(vocab_size);
  for (int64_t i = 0; i < num_tokens; ++i)
    for (int64_t j = 0; j < vocab_size; ++j) {
      const double dz = (labels[i] == j) - std::exp(exact[i * vocab_size + j] - exact_lse[i]);
      check(logits[i * stride + j], dz, 1e-5, "dz");
      exact_dbias[j] += dz;
      for (int64_t k = 0; k < size; ++k) {
        exact_dhidden[i * size + k] += dz * weight[j * size + k];
        exact_dweight[j * size + k] += dz * hidden[i * size + k];
      }
    }
  for (size_t i = 0; i < dhidden.size(); ++i) check(dhidden[i], exact_dhidden[i], 1e-4, "dhidden");
  for (size_t i = 0; i < dweight.size(); ++i) check(dweight[i], exact_dweight[i], 1e-4, "dweight");
  for (size_t i = 0; i < dbias.size(); ++i) check(dbias[i], exact_dbias[i], 1e-4, "dbias");
}

// What is thrown in one thread, a bad_alloc say, comes to the caller, and the next call is as ever.
void test_errors(int threads) {
  for (int64_t thrower = 0; thrower < 40; thrower += 13) {
    bool caught = false;
    try {
      parallel_for(40, 1, threads, [&](int64_t begin, int64_t end) {
        if (begin <= thrower && thrower < end) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    check(caught, 1, 0, "a bad_alloc of a piece");
    std::vector<double> done(40);
    parallel_for(40, 3, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) done[i] += 1;
    });
    for (const double times : done) check(times, 1, 0, "pieces after an error");
  }
}

}  // namespace

int main() {
  for (const int threads : {1, 3}) test_errors(threads);
  for (const char* isa : supported_isas()) {
    use_isa(isa);
    for (int halves = 0; halves < 2; ++halves)
      for (int threads = 1; threads < 4; threads += 2) {
        test(1, 128, 4, halves, threads);
        test(13, 300, 37, halves, threads);
        test(50, 517, 270, halves, threads);
      }
    std::printf("%s: %d failures\n", isa, failures);
  }
  return failures != 0;
}
