// The terms of the sigmoid losses (common/binary_terms.h) a vector at a time. Included by the kernels_*.cpp files only.
#pragma once

#include <limits>

#include "cpu/simd.h"

namespace ltk::LTK_ISA {
namespace {

template <class T>
struct Terms {
  Vec<T> loss, slope;
};

// What a focal factor q^gamma is computed with: whole exponents by multiplication, which is exact and quick.
template <class T>
struct Power {
  T gamma;
  int whole;  // gamma if that is an integer up to 8, else -1
  explicit Power(T gamma) : gamma(gamma), whole(-1) {
    for (int n = 0; n <= 8; ++n)
      if (gamma == T(n)) whole = n;
  }
  // log_q(): the logarithm of q, asked for if needed.
  template <class Log>
  LTK_INLINE Vec<T> of(Vec<T> q, Log log_q) const {
    if (whole < 0) return exponential(gamma * log_q());
    Vec<T> power = q;
    for (int n = 1; n < whole; ++n) power *= q;
    return power;
  }
};

// log(1 + e) for 0 <= e <= 1 to 2 ulp, NaN for NaN. In float by interpolation of log(1 + e) / e at Chebyshev nodes
// (relative error 5e-9), which needs no second division: a term is as quick as its divisions.
static inline Vec<float> logarithm_of_one_plus(Vec<float> e) {
  Vec<float> series = splat(-0.00317605701f);
  for (const float coefficient : {0.0195425283f, -0.0563736148f, 0.105436236f, -0.152696669f, 0.196632743f,
                                  -0.249516159f, 0.333297104f, -0.499998927f, 1.0f})
    series = multiply_add<float>(series, e, splat(coefficient));
  return series * e;
}
static inline Vec<double> logarithm_of_one_plus(Vec<double> e) { return logarithm_1p(e); }

// h(z) and h'(z) of a negative; a positive is h(-z). Columns past the row's end come as -inf: 0 and 0.
template <class T>
LTK_INLINE Terms<T> negative_terms(Vec<T> z, const Power<T>& power, T clip) {
  const Vec<T> zero = splat(T(0)), one = splat(T(1));
  const auto positive = z > zero;
  const Vec<T> e = exponential(positive ? -z : z);
  const Vec<T> share = one / (one + e), other = e * share;
  const Vec<T> p = positive ? share : other;
  if (clip > T(0)) {
    const Vec<T> rest = positive ? other : share;
    const Vec<T> q = maximum<T>(p - clip, zero);
    const Vec<T> nll = -logarithm_1p(-q);
    const auto none = q <= zero;
    const Vec<T> below = one / (rest + clip);
    if (power.whole == 0) return {nll, none ? zero : p * rest * below};
    Vec<T> factor = power.of(q, [&] { return logarithm_1p((none ? one : q) - one); });
    factor = none ? zero : factor;
    return {factor * nll, none ? zero : p * rest * factor * (below + power.gamma * nll / q)};
  }
  const Vec<T> small = logarithm_of_one_plus(e);
  const Vec<T> softplus = (positive ? z : zero) + small;
  if (power.whole == 0) return {softplus, p};
  const Vec<T> rest = positive ? other : share;
  const Vec<T> factor = power.of(p, [&] { return (positive ? zero : z) - small; });
  // Where softplus is infinite, 1 - p is 0.
  const T most = std::numeric_limits<T>::max();
  const Vec<T> beside = rest * (softplus > most ? splat(most) : softplus);
  return {factor * softplus, factor * (p + power.gamma * beside)};
}

// coefficient * value where a coefficient of zero takes out an infinite value, but not NaN.
template <class T>
LTK_INLINE Vec<T> masked(Vec<T> coefficient, Vec<T> value) {
  const T most = std::numeric_limits<T>::max();
  const Vec<T> product = coefficient * value;
  return ((coefficient == splat(T(0))) & (value > most)) ? splat(T(0)) : product;
}

}  // namespace
}  // namespace ltk::LTK_ISA
