// Everything of csrc/cpu that has threads and works on lists of pairs, or on two heads: with several threads the very
// numbers of one, and by a library in bf16, which this file stands for, those of csrc. Memory is of the size that is said.
// Exit status 0 where everything agrees.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/folds.h"
#include "shared/preference_batch.h"

using namespace fastdpo;

// What library.cpp looks for, by rows: c = alpha * a @ b + beta * c.
extern "C" __attribute__((visibility("default"))) void cblas_gemm_bf16bf16f32(
    int, int a_turned, int b_turned, int n, int m, int k, float alpha, const void* a, int a_stride, const void* b,
    int b_stride, float beta, float* c, int c_stride) {
  const auto at = [](const void* x, int stride, bool turned, int64_t row, int64_t col) {
    return to_float(static_cast<const BFloat16*>(x)[turned ? col * stride + row : row * stride + col]);
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      float sum = 0.0f;
      for (int64_t l = 0; l < k; ++l)
        sum += at(a, a_stride, a_turned == 112, i, l) * at(b, b_stride, b_turned == 112, l, j);
      c[i * c_stride + j] = alpha * sum + (beta == 0.0f ? 0.0f : beta * c[i * c_stride + j]);
    }
}

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  ++failures;
}

template <class T>
struct Array : std::vector<T> {
  using std::vector<T>::vector;
  // Bit for bit, and close.
  bool is(const Array& other) const {
    return this->size() == other.size() && std::memcmp(this->data(), other.data(), this->size() * sizeof(T)) == 0;
  }
  bool is_near(const Array& other) const {
    double error = 0.0, size = 0.0;
    for (size_t i = 0; i < this->size(); ++i) {
      const double a = (*this)[i], b = other[i];
      error += (a - b) * (a - b), size += b * b;
    }
    return error <= 1e-4 * size;  // 2^-8 of each of dz, squared, and some
  }
};

Array<float> drawn(int64_t count) {
  Array<float> x(count);
  for (float& value : x) value = static_cast<float>(std::rand() % 2001 - 1000) / 500.0f;
  return x;
}

struct Problem {
  int64_t tokens, vocab_size, size, blocks = blocks_of(vocab_size), bytes = bytes_of(blocks);
  Array<float> hidden = drawn(tokens * size), weight = drawn(vocab_size * size), bias = drawn(vocab_size);
  Array<BFloat16> hidden_bits = Array<BFloat16>(hidden.size()), weight_bits = Array<BFloat16>(weight.size());
  Array<int64_t> labels = Array<int64_t>(tokens), rows = Array<int64_t>(tokens);

  Problem(int64_t tokens, int64_t vocab_size, int64_t size) : tokens(tokens), vocab_size(vocab_size), size(size) {
    const auto round = [](Array<float>& x, Array<BFloat16>& bits) {
      for (size_t i = 0; i < x.size(); ++i) from_float(x[i], &bits[i]), x[i] = to_float(bits[i]);
    };
    round(hidden, hidden_bits), round(weight, weight_bits);
    for (int64_t i = 0; i < tokens; ++i) labels[i] = i * 37 % vocab_size, rows[i] = tokens - 1 - i;
  }
  Factor factor(const Array<BFloat16>& x) const { return {x.data(), size, size, DType::kBFloat16, DType::kBFloat16}; }
};

struct Results {
  Array<double> block_lse, rest_lse, divergences;
  Array<float> logps, lse, entropy, dhidden, dweight, dbias, routed_ref;
  Array<uint8_t> bitmap;
  Array<int64_t> counts;
  Array<int32_t> listed;
};

Results run(const Problem& p, int threads, Product product) {
  Results out;
  const int64_t n = p.tokens, stride = p.blocks * kBlock;
  const LogitTransform transform = {1.0f, 8.0f, 1.0f};
  Array<float> logits(n * stride), label_logit(n), coef(n, 1.0f);
  ProductsArgs dense = {};
  dense.tile = {logits.data(), stride, n, stride, 0, p.blocks, 0, p.vocab_size, nullptr, nullptr, nullptr};
  dense.hidden = {p.factor(p.hidden_bits), p.rows.data(), 0};
  dense.weight = p.factor(p.weight_bits);
  dense.num_threads = threads;
  products(dense);

  out.block_lse.resize(n * p.blocks), out.rest_lse.resize(n), out.logps.resize(n), out.lse.resize(n);
  out.entropy.resize(n);
  Array<RowStats> stats(n, RowStats{kNoLogit, 0, 0, 0, 0, kNoLogit, kNoLogit});
  const Tile tile = {logits.data(), stride, n, p.vocab_size, 0, p.bias.data(), transform};
  fold({tile, p.labels.data(), out.block_lse.data(), p.blocks, label_logit.data(), stats.data(), threads});
  sum_blocks({out.block_lse.data(), p.blocks, n, p.blocks, out.rest_lse.data(), threads});
  FinishArgs finished = {};
  finished.num_rows = n, finished.vocab_size = p.vocab_size, finished.rest_lse = out.rest_lse.data();
  finished.label_logit = label_logit.data(), finished.stats = stats.data(), finished.logps = out.logps.data();
  finished.lse = out.lse.data(), finished.entropy = out.entropy.data(), finished.num_threads = threads;
  finish(finished);

  Array<int32_t> most(n);
  out.bitmap.resize(n * 2 * p.bytes);
  RouteArgs routes = {};
  routes.block_lse = out.block_lse.data(), routes.stride = routes.num_blocks = p.blocks, routes.num_rows = n;
  routes.rest_lse = out.rest_lse.data(), routes.labels = p.labels.data(), routes.tau = 0.1f, routes.second_tau = 0.4f;
  routes.seed = 7, routes.bitmap = out.bitmap.data(), routes.bitmap_stride = 2 * p.bytes, routes.set_bytes = p.bytes;
  routes.most_pairs = most.data(), routes.num_threads = threads;
  route(routes);
  const PairSet set = {out.bitmap.data(), 2 * p.bytes, coef.data(), 0, n, 0, p.blocks, threads};
  out.counts.resize(p.blocks);
  count_pairs({set, out.counts.data()});
  Array<int64_t> offsets(p.blocks + 1);
  Array<int32_t> blocks(p.blocks);
  for (int64_t j = 0; j < p.blocks; ++j) offsets[j + 1] = offsets[j] + out.counts[j], blocks[j] = static_cast<int32_t>(j);
  const int64_t pairs = offsets[p.blocks];
  out.listed.resize(pairs);
  fill_pairs({set, offsets.data(), out.listed.data(), pairs});

  Array<float> data(pairs * kBlock), dz_hidden(pairs * kBlock), of_hidden(pairs), of_columns(pairs);
  ProductsArgs listed = dense;
  listed.tile = {data.data(), kBlock, pairs, kBlock, 0, p.blocks, 0, p.vocab_size, blocks.data(), offsets.data(),
                 out.listed.data()};
  listed.product = product;
  const Product adding = product == Product::kBf16 ? Product::kFloat32 : product;
  products(listed);
  out.routed_ref = data;
  RoutedDivergenceGradArgs of_both = {};
  RoutedGradArgs& routed = of_both.routed;
  routed.blocks = listed.tile;
  routed.grad.tile.bias = p.bias.data(), routed.grad.tile.transform = transform;
  routed.grad.num_tokens = n, routed.grad.labels = p.labels.data(), routed.grad.lse = out.lse.data();
  routed.grad.logps = out.logps.data(), routed.grad.coef = coef.data(), routed.grad.num_threads = threads;
  routed.tau = 0.1f, routed.second_tau = 0.4f, routed.second_bits = out.bitmap.data() + p.bytes;
  routed.bitmap_stride = 2 * p.bytes, routed.hidden_set = 0, routed.weight_set = 1;
  routed.hidden_weight = of_hidden.data(), routed.columns_weight = of_columns.data();
  routed.dz_hidden = dz_hidden.data(), routed.dz_hidden_stride = kBlock;
  const Array<float> before = data;
  of_both.terms.ref = {before.data(), kBlock, p.bias.data(), transform};
  Array<float> total(n, 1.0f);
  of_both.terms.ref_lse = out.lse.data(), of_both.terms.ref_logps = out.logps.data();
  of_both.terms.coef_divergence = coef.data(), of_both.terms.total = total.data();
  routed_divergence_grad(of_both);
  data = before;
  routed_grad(routed);

  out.dhidden.resize(n * p.size), out.dweight.resize(p.vocab_size * p.size), out.dbias.resize(p.vocab_size);
  AddToTokensArgs to_tokens = {};
  to_tokens.tile = listed.tile, to_tokens.tile.data = dz_hidden.data(), to_tokens.row_weight = of_hidden.data();
  to_tokens.factor = dense.weight, to_tokens.out = out.dhidden.data(), to_tokens.out_stride = p.size;
  to_tokens.num_tokens = n, to_tokens.product = adding, to_tokens.num_threads = threads;
  add_to_tokens(to_tokens);
  AddToColumnsArgs to_columns = {};
  to_columns.tile = listed.tile, to_columns.factor = dense.hidden, to_columns.out = out.dweight.data();
  to_columns.out_stride = p.size, to_columns.out_type = DType::kFloat32, to_columns.bias = out.dbias.data();
  to_columns.fresh = true, to_columns.product = adding, to_columns.num_threads = threads;
  add_to_columns(to_columns);

  out.divergences.resize(n * p.blocks * kBlockDivergenceSize);
  Array<float> ref = drawn(0), ref_label(n);
  ref.assign(logits.begin(), logits.end());
  for (float& x : ref) x *= 0.5f;
  DivergenceFoldArgs folded = {};
  folded.tile = tile, folded.ref = {ref.data(), stride, p.bias.data(), transform}, folded.labels = p.labels.data();
  folded.blocks = out.divergences.data(), folded.blocks_stride = p.blocks * kBlockDivergenceSize;
  folded.label_logit = label_logit.data(), folded.ref_label_logit = ref_label.data(), folded.num_threads = threads;
  divergence_fold(folded);
  DivergenceGradArgs graded = {};
  graded.grad = routed.grad, graded.grad.tile = tile, graded.terms = of_both.terms, graded.terms.ref = folded.ref;
  divergence_grad(graded);
  out.routed_ref.insert(out.routed_ref.end(), logits.begin(), logits.end());
  return out;
}

void test(int64_t tokens, int64_t vocab_size, int64_t size) {
  const Problem p(tokens, vocab_size, size);
  const Results plain = run(p, 1, Product::kFloat32);
  const auto same = [](const Results& a, const Results& b) {
    return a.block_lse.is(b.block_lse) && a.rest_lse.is(b.rest_lse) && a.divergences.is(b.divergences) &&
           a.logps.is(b.logps) && a.entropy.is(b.entropy) && a.dhidden.is(b.dhidden) && a.dweight.is(b.dweight) &&
           a.dbias.is(b.dbias) && a.routed_ref.is(b.routed_ref) && a.bitmap.is(b.bitmap) && a.counts.is(b.counts) &&
           a.listed.is(b.listed);
  };
  check(same(run(p, 4, Product::kFloat32), plain), "four threads have other numbers");
  for (const Product product : {Product::kBf16, Product::kBf16Library}) {
    const Results rounded = run(p, 1, product);
    check(same(run(p, 4, product), rounded), "four threads have other numbers in bf16");
    check(rounded.dhidden.is_near(plain.dhidden), "dhidden in bf16");
    check(rounded.dweight.is_near(plain.dweight), "dweight in bf16");
  }
}

}  // namespace

// With an argument, for a processor that is emulated: without the pieces that take more than one product.
int main(int count, char**) {
  check(load_bf16_product(""), "this program's own product was not found");
  for (const char* isa : supported_isas()) {
    use_isa(isa);
    test(3, 130, 5);
    test(20, 300, 21);
    if (count == 1) test(530, 130, 530);
    std::printf("%s: %d failures\n", isa, failures);
  }
  return failures != 0;
}
