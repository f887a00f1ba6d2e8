// The loss of one row from the few numbers that its sweep over the classes leaves, and what the backward needs to know
// of it. Torch-free and callable on host and device: the CPU and the GPU kernels finish their rows here.
//
// A row of adjusted logits u (margin included at the label y) with m = max u and sum = sum_j e^(u_j - m) has
//   log softmax(u)_j = (u_j - m) - log(sum),    p_j = e^(u_j - m) / sum.
// Its loss r * (F * ce + z * lse^2), with ce = -sum_j w_j q_j log p_j and q = (1 - eps) t + (eps / K) [b_j finite], has
// the gradient
//   dl/du_j = P p_j - A (1 - eps) w_j t_j - B t_j - A (eps / K) ws_j,      P = A Q + B T + 2 z lse,
// where T = sum t, Q = sum w q, ws = w on the K classes that smoothing reaches, and
//   raw focal factor F = (1 - e^-nll)^gamma:     A = F,  B = ce * gamma (1 - e^-nll)^(gamma-1) e^-nll
//   weighted focal factor F = (1 - e^-ce)^gamma: A = F + ce * gamma (1 - e^-ce)^(gamma-1) e^-ce,  B = 0
//   detached:                                    A = F,  B = 0.
// Everything beside p_j and w_j is one number a row, so the backward is one sweep over the columns.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace ltk {

template <class T>
struct RowOptions {
  T label_smoothing;      // eps
  T smoothing_per_class;  // eps / K, K classes with a finite bias
  T smoothing_total;      // sum of ws: the class weights of those K classes
  T focal_gamma;
  T z_loss;
  bool focal_weighted;
  bool focal_detached;
};

// What a forward keeps of a row for its backward: four numbers in a tensor of 4 * rows + 1, whose last is 1 /
// denominator. For a label, `at_label` is the label's whole dl/du, computed without the cancelling p - 1.
template <class T>
struct RowState {
  T max;          // m
  T probability;  // r P / sum: the factor of e^(u_j - m)
  T factor;       // r A
  T at_label;     // labels: dl/du_y; probabilities: r B
};

// The focal factor F and the factors A and B, from ce and rest = 1 - e^-nll.
template <class T>
struct FocalTerms {
  T modulation, a, b;
};

template <class T>
LTK_HOST_DEVICE FocalTerms<T> focal_terms(T ce, T rest, const RowOptions<T>& o) {
  if (o.focal_gamma == T(0)) return {T(1), T(1), T(0)};
  if (o.focal_weighted) rest = -std::expm1(-ce);
  // At rest == 0 value and gradient have the limit 0, though rest^(gamma - 1) alone is infinite for gamma < 1.
  if (!(rest > T(0))) return rest == rest ? FocalTerms<T>{T(0), T(0), T(0)} : FocalTerms<T>{rest, rest, rest};
  const T modulation = std::pow(rest, o.focal_gamma);
  if (o.focal_detached) return {modulation, modulation, T(0)};
  const T p = T(1) - rest;
  const T slope =
      p > T(0) ? ce * o.focal_gamma * (modulation / rest) * p : T(0);  // p = 0: ce may be infinite, the slope is 0
  return o.focal_weighted ? FocalTerms<T>{modulation, modulation + slope, T(0)}
                          : FocalTerms<T>{modulation, modulation, slope};
}

// The factor alpha / (norm |p - onehot|_1 + eps) of influence-balanced loss, |p - onehot|_1 = 2 rest. It multiplies
// what the focal factor does; its own derivative with respect to nll is -factor 2 norm p / (2 norm rest + eps).
template <class T>
struct Influence {
  T norm, alpha, eps;
};

template <class T>
LTK_HOST_DEVICE FocalTerms<T> with_influence(const FocalTerms<T>& f, T ce, T rest, const Influence<T>& influence,
                                             bool detached) {
  const T below = T(2) * influence.norm * rest + influence.eps, factor = influence.alpha / below;
  const T p = T(1) - rest;
  const T slope = !detached && p > T(0) && influence.norm > T(0)
                      ? ce * f.modulation * factor * (T(2) * influence.norm * p / below)
                      : T(0);
  return {f.modulation * factor, f.a * factor, f.b * factor - slope};
}

// weight * value where a weight of zero takes out an infinite value.
template <class T>
LTK_HOST_DEVICE T weighted(T weight, T value) {
  return weight == T(0) ? T(0) : weight * value;
}

// A row with a label. `others` is the sum of e^(u_j - m) over j != y, `at_label` e^(u_y - m), `label_distance` m - u_y,
// `smooth_distance` sum_j ws_j (m - u_j) (margin included), `weight` w_y, `smooth_weight` ws_y, `row_weight` r.
template <class T>
LTK_HOST_DEVICE T finish_label_row(T max, T others, T at_label, T label_distance, T smooth_distance, T weight,
                                   T smooth_weight, T row_weight, const RowOptions<T>& o, RowState<T>* state,
                                   const Influence<T>* influence = nullptr) {
  const T sum = others + at_label;
  const T log_sum = std::log(sum);
  const T lse = max + log_sum;
  const T p = at_label / sum, rest = others / sum;
  // log1p keeps the digits of a small loss, which log(sum) + (m - u_y) rounds away.
  const T nll = at_label > others ? std::log1p(others / at_label) : label_distance + log_sum;
  const T hard = (T(1) - o.label_smoothing) * weight;
  const T soft = o.smoothing_per_class;
  T ce = weighted(hard, nll);
  if (soft > T(0)) ce += soft * (o.smoothing_total * log_sum + smooth_distance);
  FocalTerms<T> f = focal_terms(ce, rest, o);
  if (influence != nullptr) f = with_influence(f, ce, rest, *influence, o.focal_detached);
  const T spread = f.a * soft * o.smoothing_total + T(2) * o.z_loss * lse;  // P minus the label's own part of it
  const T own = f.a * hard + f.b;
  state->max = max;
  state->probability = row_weight * (own + spread) / sum;
  state->factor = row_weight * f.a;
  state->at_label = row_weight * (spread * p - own * rest - f.a * soft * smooth_weight);
  return weighted(row_weight, weighted(f.modulation, ce) + (o.z_loss > T(0) ? o.z_loss * lse * lse : T(0)));
}

// A row of probabilities t. `total` is sum t, `distance` sum t_j (m - u_j); the weighted ones have w_j t_j in place of
// t_j.
template <class T>
LTK_HOST_DEVICE T finish_probability_row(T max, T sum, T total, T distance, T weighted_total, T weighted_distance,
                                         T smooth_distance, T row_weight, const RowOptions<T>& o, RowState<T>* state) {
  const T log_sum = std::log(sum);
  const T lse = max + log_sum;
  const T nll = total * log_sum + distance;
  const T hard = T(1) - o.label_smoothing, soft = o.smoothing_per_class;
  T ce = hard > T(0) ? hard * (weighted_total * log_sum + weighted_distance) : T(0);
  if (soft > T(0)) ce += soft * (o.smoothing_total * log_sum + smooth_distance);
  const FocalTerms<T> f = focal_terms(ce, -std::expm1(-nll), o);
  const T all = f.a * (hard * weighted_total + soft * o.smoothing_total) + f.b * total + T(2) * o.z_loss * lse;
  state->max = max;
  state->probability = row_weight * all / sum;
  state->factor = row_weight * f.a;
  state->at_label = row_weight * f.b;
  return weighted(row_weight, weighted(f.modulation, ce) + (o.z_loss > T(0) ? o.z_loss * lse * lse : T(0)));
}

}  // namespace ltk
