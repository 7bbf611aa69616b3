// The divergence's loops over two tiles of logits; included by folds.cpp, once per instruction set.
#pragma once

namespace fastdpo {
namespace FASTDPO_ISA {
namespace {

// p * x, where nothing has no part in it.
inline Vec part(Vec p, Vec x) { return p == Vec{} ? Vec{} : p * x; }

inline void logits_of(const float* data, const float* bias, const LogitTransform& t, int64_t cols, float* z,
                      float* slope) {
  if (t.softcap != 0.0f)
    slope ? transform_block<true, true>(data, bias, t, cols, z, slope)
          : transform_block<true, false>(data, bias, t, cols, z, nullptr);
  else
    transform_block<false, false>(data, bias, t, cols, z, nullptr);
}

struct Exponentials {
  float max, sum;
};

// e = exp(z - max)
inline Exponentials exponentials(const float* z, float* e) {
  Vec m = splat(-kInf);
  for (int64_t i = 0; i < kBlock; i += kLanes) m = max(m, load(z + i));
  float block_max = max(m);
  if (block_max == -kInf) block_max = 0.0f;
  Vec s{};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec x = exp(load(z + i) - splat(block_max));
    s += x;
    store(e + i, x);
  }
  return {block_max, sum(s)};
}

// mean and variance of u under weights w whose sum is `total`
inline void moments(const float* w, const float* u, float total, float& mean, float& var) {
  mean = var = 0.0f;
  if (total == 0.0f) return;
  Vec m{}, v{};
  for (int64_t i = 0; i < kBlock; i += kLanes) m += part(load(w + i), load(u + i));
  mean = sum(m) / total;
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec d = load(u + i) - splat(mean);
    v += part(load(w + i), d * d);
  }
  var = sum(v) / total;
}

inline void fold_kl(const float* z, const float* w, BlockDivergence& out) {
  alignas(64) float p[kBlock], r[kBlock], u[kBlock];
  const Exponentials of_p = exponentials(z, p), of_r = exponentials(w, r);
  const float log_p = std::log(of_p.sum), log_r = std::log(of_r.sum);
  out.lse = static_cast<double>(of_p.max) + log_p, out.ref_lse = static_cast<double>(of_r.max) + log_r;
  const bool both = of_p.sum != 0.0f && of_r.sum != 0.0f;  // else u is infinite wherever it counts
  const Vec shift = splat(both ? log_p - log_r : 0.0f);
  Vec d{};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec x = load(z + i) - splat(of_p.max);
    d += part(load(p + i), x);
    store(u + i, x - (load(w + i) - splat(of_r.max)) - shift);
  }
  out.entropy = of_p.sum == 0.0f ? 0.0f : log_p - sum(d) / of_p.sum;
  moments(p, u, of_p.sum, out.mean_p, out.var_p);
  moments(r, u, of_r.sum, out.mean_r, out.var_r);
}

// log(p / m) and log(r / m) of some ids
struct Ratios {
  Vec of_p, of_r;
};

inline Ratios ratios(Vec p, Vec r, float beta) {
  const Vec m = splat(1.0f - beta) * p + splat(beta) * r;
  return {log(p / m), log(r / m)};
}

inline void fold_jsd(const float* z, const float* w, float lse, float ref_lse, float beta, BlockDivergence& out) {
  alignas(64) float p[kBlock], u[kBlock];
  Vec mass{}, value{};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec x = exp(load(z + i) - splat(lse)), y = exp(load(w + i) - splat(ref_lse));
    const Ratios of = ratios(x, y, beta);
    store(p + i, x);
    store(u + i, of.of_p);
    mass += x;
    value += part(splat(1.0f - beta) * x, of.of_p) + part(splat(beta) * y, of.of_r);
  }
  out.mean_r = sum(value);
  moments(p, u, sum(mass), out.mean_p, out.var_p);
}

void divergence_fold_rows(const DivergenceFoldArgs& a, int64_t begin, int64_t end) {
  const Tile& tile = a.tile;
  const RefTile& ref = a.ref;
  alignas(64) float z[kBlock], w[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = columns_past(a.labels[row], tile.col_start);
    for (int64_t col = 0; col < tile.num_cols; col += kBlock) {
      const int64_t cols = std::min(kBlock, tile.num_cols - col), in_block = columns_past(label, col);
      logits_of(tile.data + row * tile.stride + col, tile.bias ? tile.bias + col : nullptr, tile.transform, cols, z,
                nullptr);
      logits_of(ref.ref_data + row * ref.ref_stride + col, ref.ref_bias ? ref.ref_bias + col : nullptr,
                ref.ref_transform, cols, w, nullptr);
      if (in_block >= 0 && in_block < cols) {
        a.label_logit[row] = z[in_block], a.ref_label_logit[row] = w[in_block];
        z[in_block] = w[in_block] = -kInf;
      }
      BlockDivergence& out = *a.block(row, col / kBlock);
      if (a.lse)
        fold_jsd(z, w, static_cast<float>(a.lse[row]), static_cast<float>(a.ref_lse[row]), static_cast<float>(a.beta),
                 out);
      else
        fold_kl(z, w, out);
    }
  }
}

struct BlockGrad {
  float bound;  // of the sum of |dD/dz|, the label's left out
  float mass;   // of p, the label's left out
};

// z and w of one block -> dz/d(product), into dz.
template <DivergenceKind kKind>
inline BlockGrad divergence_grad_block(const GradArgs& a, const DivergenceTerms& t, int64_t row, int64_t token,
                                       int64_t col, int64_t cols, float* dz) {
  const Tile& tile = a.tile;
  const RefTile& ref = t.ref;
  alignas(64) float z[kBlock], w[kBlock], slope[kBlock];
  const bool capped = tile.transform.softcap != 0.0f;
  logits_of(tile.data + row * tile.stride + col, tile.bias ? tile.bias + col : nullptr, tile.transform, cols, z, slope);
  logits_of(ref.ref_data + row * ref.ref_stride + col, ref.ref_bias ? ref.ref_bias + col : nullptr, ref.ref_transform,
            cols, w, nullptr);
  const int64_t label = columns_past(a.labels[token], tile.col_start + col);
  const bool has_label = label >= 0 && label < cols;
  if (has_label) z[label] = w[label] = -kInf;
  const float constant_slope = tile.transform.scale * tile.transform.inv_temperature;
  const float beta = static_cast<float>(t.beta), mean = t.mean ? t.mean[token] : 0.0f;
  const float entropy = a.entropy ? a.entropy[token] : 0.0f, coef_entropy = a.coef_entropy ? a.coef_entropy[token] : 0.0f;
  // a factor of 0 is not multiplied: a divergence may be infinite
  const float g = t.coef_divergence[token], coef = a.coef[token];
  const float scale = kKind == DivergenceKind::kJSD ? g * (1.0f - beta) : g;
  const Vec lse = splat(a.lse[token]), ref_lse = splat(t.ref_lse[token]);
  Vec mass{}, ref_mass{}, square{};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Vec log_p = min(load(z + i) - lse, Vec{}), log_r = min(load(w + i) - ref_lse, Vec{});
    const Vec p = exp(log_p), r = exp(log_r);
    Vec d;
    mass += p;
    if (kKind == DivergenceKind::kForwardKL) {
      const Vec x = log_p - log_r;
      d = p - r;
      ref_mass += r;
      square += part(p, x * x) + part(r, x * x);
    } else {
      const Vec x = (kKind == DivergenceKind::kReverseKL ? log_p - log_r : ratios(p, r, beta).of_p) - splat(mean);
      d = part(p, x);
      square += part(d, x);
    }
    Vec out = g == 0.0f ? Vec{} : splat(scale) * d;
    if (coef != 0.0f) out -= splat(coef) * p;
    if (coef_entropy != 0.0f) out -= splat(coef_entropy) * p * (max(log_p, splat(kLeastLogP)) + splat(entropy));
    store(dz + i, capped ? out * load(slope + i) : out * splat(constant_slope));
  }
  const BlockGrad found = {divergence_bound(kKind, sum(mass), sum(ref_mass), sum(square)), sum(mass)};
  if (has_label) {
    const float logp = a.logps[token], p = std::exp(logp), ref_logp = t.ref_logps[token];
    float d;
    if (kKind == DivergenceKind::kForwardKL) {
      d = std::expm1(logp) - std::expm1(ref_logp);
    } else if (p == 0.0f) {
      d = 0.0f;
    } else if (kKind == DivergenceKind::kReverseKL) {
      d = p * (logp - ref_logp - mean);
    } else {
      d = p * (-std::log1p(beta * std::expm1(ref_logp - logp)) - mean);
    }
    float out = g == 0.0f ? 0.0f : scale * d;
    out += label_grad(logp, coef, entropy, coef_entropy);
    dz[label] = out * (capped ? slope[label] : constant_slope);
  }
  return found;
}

inline BlockGrad divergence_grad_block(const GradArgs& a, const DivergenceTerms& t, int64_t row, int64_t token,
                                       int64_t col, int64_t cols, float* dz) {
  switch (static_cast<DivergenceKind>(t.kind)) {
    case DivergenceKind::kForwardKL:
      return divergence_grad_block<DivergenceKind::kForwardKL>(a, t, row, token, col, cols, dz);
    case DivergenceKind::kReverseKL:
      return divergence_grad_block<DivergenceKind::kReverseKL>(a, t, row, token, col, cols, dz);
    default:
      return divergence_grad_block<DivergenceKind::kJSD>(a, t, row, token, col, cols, dz);
  }
}

void divergence_grad_rows(const DivergenceGradArgs& a, int64_t begin, int64_t end) {
  const Tile& tile = a.grad.tile;
  alignas(64) float dz[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = a.grad.tokens ? a.grad.tokens[row] : row;
    for (int64_t col = 0; col < tile.num_cols; col += kBlock) {
      const int64_t cols = std::min(kBlock, tile.num_cols - col);
      divergence_grad_block(a.grad, a.terms, row, token, col, cols, dz);
      std::memcpy(tile.data + row * tile.stride + col, dz, cols * sizeof(float));
    }
  }
}

void routed_divergence_grad_rows(const RoutedDivergenceGradArgs& a, int64_t begin, int64_t end) {
  const GradArgs& grad = a.routed.grad;
  const Tile& tile = grad.tile;
  alignas(64) float dz[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = grad.tokens[row], label = columns_past(grad.labels[token], tile.col_start);
    const BlockGrad found = divergence_grad_block(grad, a.terms, row, token, 0, tile.num_cols, dz);
    const bool own = label >= 0 && label < tile.num_cols;
    float share = a.terms.total[token] == 0.0f ? 0.0f : found.bound / a.terms.total[token];
    if (a.terms.routes_logps) {
      const float tail = found.mass / -std::expm1(grad.logps[token]);
      share = share < tail ? tail : share;
    }
    weigh_row(a.routed, row, token, own, share);
    std::memcpy(tile.data + row * tile.stride, dz, tile.num_cols * sizeof(float));
  }
}

}  // namespace
}  // namespace FASTDPO_ISA
}  // namespace fastdpo
