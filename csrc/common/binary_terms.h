// One term of the sigmoid losses, its derivative, and which negatives are kept. Torch-free, for host and device; the
// CPU's vectors have a form of their own (cpu/sigmoid_terms.h).
//
// A negative with logit z costs h(z) = -q^gamma log(1 - q) with q = max(p - clip, 0), p = sigmoid(z); a positive h(-z)
// without a clip. With e = e^-|z|, which does not overflow: p and 1 - p are 1 / (1 + e) and e / (1 + e),
// -log(1 - p) = max(z, 0) + log1p(e) and log p = min(z, 0) - log1p(e). So
//   clip = 0: h = p^gamma softplus(z),     h' = p^gamma (p + gamma (1 - p) softplus(z))
//   clip > 0: h = -q^gamma log1p(-q),      h' = p (1 - p) q^gamma (1 / (1 - q) - gamma log1p(-q) / q)   where q > 0
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/masked_term.h"
#include "common/philox.h"

namespace ltk {

template <class T>
struct BinaryOptions {
  T alpha_pos, alpha_neg, gamma_pos, gamma_neg, clip;
  T score_logit;  // negatives with at least this logit are kept, if `scored`
  bool scored;
  bool row_draws;  // one draw for all columns of a row
};

template <class T>
struct BinaryTerm {
  T loss, slope;
};

template <class T>
LTK_HOST_DEVICE BinaryTerm<T> negative_term(T z, T gamma, T clip) {
  const T e = std::exp(-std::fabs(z)), small = std::log1p(e), share = T(1) / (T(1) + e);
  const T p = z >= T(0) ? share : e * share, rest = z >= T(0) ? e * share : share;
  if (clip > T(0)) {
    const T q = p - clip;
    if (q <= T(0)) return {T(0), T(0)};
    const T nll = -std::log1p(-q);
    const T power = gamma == T(0) ? T(1) : std::pow(q, gamma);
    return {power * nll, p * rest * power * (T(1) / (rest + clip) + gamma * nll / q)};
  }
  const T softplus = (z > T(0) ? z : T(0)) + small;
  if (gamma == T(0)) return {softplus, p};
  const T power = gamma == T(2) ? p * p : std::exp(gamma * ((z < T(0) ? z : T(0)) - small));
  const T beside = rest == T(0) ? T(0) : rest * softplus;  // softplus may be infinite
  return {power * softplus, power * (p + gamma * beside)};
}

// Draws are multiples of 2^-24 in [0, 1): below a probability of 1 always, below 0 never, in all precisions alike.
LTK_HOST_DEVICE float draw_of(uint32_t word) { return float(word >> 8) * 5.9604644775390625e-8f; }
LTK_HOST_DEVICE int64_t draw_blocks(int64_t classes) { return (classes + 3) / 4; }
LTK_HOST_DEVICE float row_draw(int64_t row, uint32_t step, uint64_t seed) {
  return draw_of(philox(uint64_t(row), step, negative_drops, seed).words[0]);
}
LTK_HOST_DEVICE float element_draw(int64_t row, int64_t j, int64_t classes, uint32_t step, uint64_t seed) {
  const PhiloxBlock block = philox(uint64_t(row * draw_blocks(classes) + j / 4), step, negative_drops, seed);
  const int64_t k = j % 4;  // chosen, not indexed: a GPU has no addresses for registers
  const uint32_t low = k == 0 ? block.words[0] : block.words[1], high = k == 2 ? block.words[2] : block.words[3];
  return draw_of(k < 2 ? low : high);
}

}  // namespace ltk
