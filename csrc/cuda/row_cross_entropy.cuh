// The kernels of losses whose adjustments depend on the row: any strides and types, one element at a time, as in
// cross_entropy_any.cuh; a row is read again, from a cache, for each sweep.
//
// A forward sweeps over the classes that are no label of the row, and finishes each label with them: with m0 and S the
// maximum of u_j and the sum of e^(u_j - m0) over those classes, label k's softmax has the sum
//   S e^(m0 - m_k) + e^(u_o - m_k) + e^(l_k - m_k),   m_k = max(m0, u_o, l_k),
// where l_k is its adjusted logit and u_o the plain one of the other label, if that is another class.
//
// A backward is elementwise: it reads no logit but its own, since another thread may have put the gradient there. The
// state keeps m_k in place of m0 for that.
#pragma once

#include <cmath>

#include "cuda/batch.cuh"
#include "cuda/cross_entropy_any.cuh"
#include "cuda/row_cross_entropy.h"

namespace ltk::cuda {

// Blocks on a multiprocessor: so few that nothing spills.
template <class T>
constexpr int row_forward_blocks(int a_row) {
  return any_blocks<T>(a_row) * 5 / 8;
}
template <class T>
constexpr int row_backward_blocks(int a_row) {
  return any_blocks<T>(a_row) * 3 / 4;
}

// The labels of a row; a label that is ignored or wrong has y = -1, which is no class.
struct RowLabels {
  int64_t y[2];
  bool ignored[2];
  int error[2];

  template <class T>
  LTK_DEVICE RowLabels(const RowCall<T>& call, int64_t r) : y{-1, -1}, ignored{true, true}, error{0, 0} {
    set(0, read_label(call, r));
    if (call.has_two_labels())
      set(1, check_label(call, label_at(call.second_target, call.target_type, call.second_layout.offset(r))));
  }
  LTK_DEVICE void set(int k, const Label& label) {
    ignored[k] = label.ignored;
    error[k] = label.error;
    y[k] = label.ignored || label.error != 0 ? -1 : label.y;
  }
  LTK_DEVICE bool any() const { return y[0] >= 0 || y[1] >= 0; }
  LTK_DEVICE bool all_ignored() const { return ignored[0] && ignored[1]; }
  LTK_DEVICE bool has(int64_t j) const { return j == y[0] || j == y[1]; }
};

// How the logits of a row are adjusted, margins apart.
template <class T>
struct RowView {
  int64_t r, y, offset;  // y: the label that a pair term is of
  T gate;
  // Seesaw: its second term begins where log p_j = max(log p_y, log eps), at the logit `least`. That is what the state
  // keeps, in place of the row's log-sum-exp: z_y is out of a backward's reach.
  T least, own_log_count;
  uint32_t step;

  LTK_DEVICE RowView(const RowCall<T>& call, int64_t r, int64_t y)
      : r(r), y(y), offset(call.input_layout.offset(r)), gate(0), least(0), own_log_count(0), step(0) {
    if (call.gate != nullptr) gate = call.gate[r];
    if (call.pair_term == PairTerm::drop) step = uint32_t(*call.step);
  }
  LTK_DEVICE void set_seesaw(const RowCall<T>& call, T least_logit) {
    least = least_logit;
    own_log_count = call.pair[y];
  }

  template <class E>
  LTK_DEVICE T logit(const RowCall<T>& call, int64_t j) const {
    return T(widen(static_cast<const E*>(call.input)[offset + j * call.input_layout.stride_class]));
  }
  LTK_DEVICE T scale(const RowCall<T>& call, int64_t j) const {  // A_j
    if (call.scale == nullptr) return T(1);
    return call.gate != nullptr ? T(1) + gate * call.scale[j] : call.scale[j];
  }
  LTK_DEVICE T bias(const RowCall<T>& call, int64_t j) const {  // B_j
    if (call.bias == nullptr) return T(0);
    return call.gate != nullptr ? gate * call.bias[j] : call.bias[j];
  }
  LTK_DEVICE T plain(const RowCall<T>& call, int64_t j, T x) const {
    // A masked logit stays masked by a factor of 0 or below, which a gate may give.
    const T scaled = x == -T(INFINITY) ? x : x * scale(call, j);
    return call.uniform_scale * (scaled + bias(call, j));
  }
  LTK_DEVICE T adjusted(const RowCall<T>& call, int64_t j, T x) const {
    const T z = plain(call, j, x);
    if (call.pair_term == PairTerm::none || y < 0) return z;
    if (call.pair_term == PairTerm::table) return z + call.pair[y * call.classes + j];
    if (j == y) return z;
    if (call.pair_term == PairTerm::seesaw)
      return z + Seesaw<T>{call.pair_p, call.pair_q, own_log_count, T(0)}(call.pair[j], z - least);
    if (call.pair[j] == T(0) || !is_dropped(r, j, call.classes, step, call.seed, call.drop_threshold)) return z;
    return z + -T(INFINITY);  // NaN stays NaN
  }
};

// use(j, x_j) for the columns of a thread. Several logits are loaded at once, so that they are on the way together.
template <class E, int a_row, class T, class Use>
LTK_DEVICE void sweep_row(const RowCall<T>& call, const RowView<T>& view, int first, Use use) {
  constexpr int together = 4;
  for (int64_t begin = first; begin < call.classes; begin += together * a_row) {
    T x[together];
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const int64_t j = begin + k * a_row;
      x[k] = j < call.classes ? view.template logit<E>(call, j) : T(0);
    }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      const int64_t j = begin + k * a_row;
      if (j < call.classes) use(j, x[k]);
    }
  }
}

// What is subtracted from logits below m: e^(-inf - 0) is 0.
template <class T>
LTK_DEVICE T subtracted(T max) {
  return max == -T(INFINITY) ? T(0) : max;
}

// Seesaw's log-sum-exp of all classes.
template <class E, int a_row, class T>
LTK_DEVICE T log_sum_of(const RowCall<T>& call, const RowView<T>& view, int first) {
  T max = -T(INFINITY), sum = T(0);
  sweep_row<E, a_row>(call, view, first, [&](int64_t j, T x) {
    const T z = view.plain(call, j, x);
    max = z > max ? z : max;
  });
  max = row_max<a_row>(max);
  const T base = subtracted(max);
  sweep_row<E, a_row>(call, view, first,
                      [&](int64_t j, T x) { sum += simt::exp2(exponent(view.plain(call, j, x), log2_e<T>, base)); });
  return base + std::log(row_sum<a_row>(sum));
}

// The sums over the classes that are no labels; max -inf if there are none, or all are masked.
template <class T>
struct OtherClasses {
  T max, exponentials, smooth_distance;
};

template <class E, int a_row, class T>
LTK_DEVICE OtherClasses<T> sum_others(const RowCall<T>& call, const RowView<T>& view, const RowLabels& labels,
                                      int first) {
  const bool smoothing = call.options.label_smoothing > T(0);
  OtherClasses<T> others{-T(INFINITY), T(0), T(0)};
  sweep_row<E, a_row>(call, view, first, [&](int64_t j, T x) {
    const T u = view.adjusted(call, j, x);
    others.max = !labels.has(j) && u > others.max ? u : others.max;
  });
  others.max = row_max<a_row>(others.max);
  const T base = subtracted(others.max);
  sweep_row<E, a_row>(call, view, first, [&](int64_t j, T x) {
    if (labels.has(j)) return;
    const T u = view.adjusted(call, j, x);
    others.exponentials += simt::exp2(exponent(u, log2_e<T>, base));
    if (smoothing) others.smooth_distance += weighted(smoothing_weight(call, j), base - u);
  });
  others.exponentials = row_sum<a_row>(others.exponentials);
  if (smoothing) others.smooth_distance = row_sum<a_row>(others.smooth_distance);
  return others;
}

// Loss and state of label k, whose class is `y`; `other` is the other label if it is another class, else -1.
template <class E, class T>
LTK_DEVICE T finish_label(const RowCall<T>& call, const RowOptions<T>& shared_options, const RowView<T>& view,
                          const OtherClasses<T>& others, int64_t y, int64_t other, T share, RowState<T>* state) {
  const T x = view.template logit<E>(call, y), margin = margin_of(call, y);
  T own;
  if (call.margin_type == MarginType::additive)
    own = view.adjusted(call, y, x) - call.uniform_scale * margin;
  else
    own = view.adjusted(call, y, arc_cosine(x, margin, call.margin_type).value);
  const T beside = other < 0 ? -T(INFINITY) : view.adjusted(call, other, view.template logit<E>(call, other));
  T max = others.max;
  max = beside > max ? beside : max;
  max = own > max ? own : max;

  RowOptions<T> options = shared_options;
  T smooth_distance = T(0), smooth_weight = T(0);
  if (shared_options.label_smoothing > T(0)) {
    const T eps = call.class_smoothing != nullptr ? call.class_smoothing[y] : call.smoothing;
    options = row_options(shared_options, eps, T(1) / shared_options.smoothing_per_class, call.off_target);
    smooth_weight = smoothing_weight(call, y);
    const T other_weight = other < 0 ? T(0) : smoothing_weight(call, other);
    const T rise = others.max == -T(INFINITY) ? T(0) : max - others.max;
    smooth_distance = others.smooth_distance + (options.smoothing_total - smooth_weight - other_weight) * rise +
                      weighted(other_weight, max - beside) + weighted(smooth_weight, max - own);
  }
  const T rest = others.exponentials * simt::exp2(exponent(others.max, log2_e<T>, max)) +
                 simt::exp2(exponent(beside, log2_e<T>, max));
  const T at_label = simt::exp2(exponent(own, log2_e<T>, max));
  const T row_weight = (call.row_weight != nullptr ? call.row_weight[view.r] : T(1)) * share;
  // Without norms a factor of 1: a pointer that may be null would keep it out of registers.
  const bool of_influence = call.feature_norm != nullptr;
  const Influence<T> influence{of_influence ? call.feature_norm[view.r] : T(0),
                               of_influence ? call.influence_alpha : T(1), of_influence ? call.influence_eps : T(1)};
  const T loss =
      finish_label_row(max, rest, at_label, max - own, smooth_distance, call.weight != nullptr ? call.weight[y] : T(1),
                       smooth_weight, row_weight, options, state, &influence);
  // What has no weight moves nothing, even where its loss is infinite.
  if (row_weight == T(0) && rest + at_label == rest + at_label)
    state->probability = state->factor = state->at_label = T(0);
  state->factor *= options.smoothing_per_class;
  return loss;
}

// The gradient of a row with respect to its adjusted logits: P e^(u_j - m) - F ws_j for the classes that are no labels.
// m is the least of the labels' maxima, which no such class exceeds.
template <class T>
struct RowGradients {
  struct OfLabel {
    bool given;  // not ignored; a wrong one has NaNs
    int64_t y;
    T max, probability, factor, at_label;
  };
  OfLabel of[2];
  T max, probability, factor;

  LTK_DEVICE RowGradients() : of{}, max(INFINITY), probability(0), factor(0) {}
  // Label k, multiplied by `by`.
  LTK_DEVICE void set(int k, int64_t y, const RowState<T>& state, T by) {
    of[k] = {true, y, state.max, by * state.probability, by * state.factor, by * state.at_label};
    max = state.max < max ? state.max : max;
  }
  LTK_DEVICE void finish() {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!of[k].given) continue;
      probability += of[k].probability * simt::exp2(exponent(max, log2_e<T>, of[k].max));
      factor += of[k].factor;
    }
  }

  // What flows to the logit's column, by A_j, to the class's bias, and to its scale.
  struct Column {
    T logit, bias, scale;
  };
  LTK_DEVICE Column at(const RowCall<T>& call, int64_t j, T x, T u) const {
    const T smooth = call.options.label_smoothing > T(0) ? smoothing_weight(call, j) : T(0);
    const T finite = x == -T(INFINITY) ? T(0) : x;  // whatever flows to a masked logit, its scale does not move it
    if (!(of[0].given && j == of[0].y) && !(of[1].given && j == of[1].y)) {
      const T d = probability * simt::exp2(exponent(u, log2_e<T>, max)) - factor * smooth;
      return {d, d, d * finite};
    }
    T own = T(0), plain = T(0);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!of[k].given) continue;
      if (of[k].y == j)
        own += of[k].at_label;
      else
        plain += of[k].probability * simt::exp2(exponent(u, log2_e<T>, of[k].max)) - of[k].factor * smooth;
    }
    if (call.margin_type == MarginType::additive) return {own + plain, own + plain, (own + plain) * finite};
    const ArcCosine<T> moved = arc_cosine(x, margin_of(call, j), call.margin_type);
    return {own * moved.slope + plain, own + plain, own * moved.value + plain * finite};
  }
};

// How one label's loss changes with the row's gate.
template <class E, int a_row, class T>
LTK_DEVICE T gate_slope(const RowCall<T>& call, const RowView<T>& view, int64_t y, const RowState<T>& state,
                        int first) {
  RowGradients<T> gradient;
  gradient.set(0, y, state, call.uniform_scale);
  gradient.finish();
  T slope = T(0);
  sweep_row<E, a_row>(call, view, first, [&](int64_t j, T x) {
    const auto d = gradient.at(call, j, x, view.adjusted(call, j, x));
    if (call.scale != nullptr) slope += d.scale * call.scale[j];
    if (call.bias != nullptr) slope += d.bias * call.bias[j];
  });
  return row_sum<a_row>(slope);
}

template <class E, class T, int a_row>
LTK_DEVICE void forward_row(const RowCall<T>& call, const RowOptions<T>& options, int64_t r, int first,
                            Totals (&totals)[2]) {
  const RowLabels labels(call, r);
  const RowStates<T> states = call.states();
  RowView<T> view(call, r, labels.y[0]);
  OtherClasses<T> others{};
  if (labels.any()) {
    if (call.pair_term == PairTerm::seesaw) {
      const T lse = log_sum_of<E, a_row>(call, view, first);
      const T own = view.plain(call, view.y, view.template logit<E>(call, view.y));
      view.set_seesaw(call, own > lse + call.log_pair_eps ? own : lse + call.log_pair_eps);
      if (first == 0) states.log_sum[r] = view.least;
    }
    others = sum_others<E, a_row>(call, view, labels, first);
  } else if (first == 0 && call.pair_term == PairTerm::seesaw) {
    states.log_sum[r] = T(0);
  }
  if (first != 0 && call.gate == nullptr) return;
  T row_loss = T(0);
  int64_t y = labels.y[0], y2 = labels.y[1];
  int error = labels.error[0];
  T share = !call.has_two_labels() ? T(1) : call.lam != nullptr ? call.lam[r] : call.one_lam;
#pragma unroll 1  // once in the code: as two copies it spills
  for (int k = 0; k < (call.has_two_labels() ? 2 : 1); ++k) {
    const T wrong = error != 0 ? T(NAN) : T(0);
    T loss = wrong, slope = wrong;
    RowState<T> state{wrong, wrong, wrong, wrong};
    if (y >= 0) {
      loss = finish_label<E>(call, options, view, others, y, y2 == y ? -1 : y2, share, &state);
      if (call.gate != nullptr) slope = gate_slope<E, a_row>(call, view, y, state, first);
    }
    if (first == 0) {
      const double counted = y >= 0 ? denominator_part(call, r, y) : error != 0 ? 1.0 : 0.0;
      if (error != 0) *call.error = error;
      (k == 0 ? states.of_label[0] : states.of_label[1])[r] = state;
      if (call.gate != nullptr) (k == 0 ? states.of_gate[0] : states.of_gate[1])[r] = slope;
      row_loss += loss;
      (k == 0 ? totals[0].a : totals[1].a) += double(loss);
      (k == 0 ? totals[0].b : totals[1].b) += counted;
    }
    y = labels.y[1];
    y2 = labels.y[0];
    error = labels.error[1];
    share = T(1) - share;
  }
  if (first == 0 && call.reduction == Reduction::none) call.loss[r] = row_loss;
}

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), row_forward_blocks<T>(a_row))
row_forward_kernel(const RowCall<T> call) {
  RowOptions<T> options = call.options;
  count_smoothing(call, &options);
  constexpr int rows = any_threads(a_row) / a_row;  // of a block at a time
  const int first = simt::thread() % a_row;
  Totals totals[2] = {};
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows)
    forward_row<E, T, a_row>(call, options, r, first, totals);
  finish_batch(call, totals, call.has_two_labels() ? 2 : 1, call.states().inverse);
}

// What all columns of a row share in the backward.
template <class T>
struct BackwardRow {
  RowView<T> view;
  RowGradients<T> gradient;
  int64_t out;  // where its gradient is
  bool ignored;

  LTK_DEVICE BackwardRow(const RowCall<T>& call, const T (&inverses)[2], int64_t r, bool with_gate)
      : view(call, r, -1), out(call.gradient_layout.offset(r)) {
    const RowLabels labels(call, r);
    const RowStates<T> states = call.states();
    view.y = labels.y[0];
    ignored = labels.all_ignored();
    T slope = T(0);
    const T upstream = call.upstream[call.upstream_layout.offset(r)];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (labels.ignored[k]) continue;
      gradient.set(k, labels.y[k], read_state(states.of_label[k], r), call.uniform_scale * inverses[k] * upstream);
      if (with_gate) slope += upstream * inverses[k] * states.of_gate[k][r];
    }
    gradient.finish();
    if (call.pair_term == PairTerm::seesaw && view.y >= 0) view.set_seesaw(call, states.log_sum[r]);
    if (with_gate) call.gate_gradient[r] = slope;
  }

  LTK_DEVICE typename RowGradients<T>::Column at(const RowCall<T>& call, int64_t j, T x) const {
    if (ignored) return {T(0), T(0), T(0)};
    return gradient.at(call, j, x, view.adjusted(call, j, x));
  }
};

template <class T>
LTK_DEVICE void read_inverses(const RowCall<T>& call, T (&inverses)[2]) {
  const T* kept = call.states().inverse;
  inverses[1] = read_inverse_denominator(call, kept + 1);  // the last number tells whose state it is
  inverses[0] = inverses[1] == inverses[1] ? kept[0] : T(NAN);
}

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), row_backward_blocks<T>(a_row))
row_backward_kernel(const RowCall<T> call) {
  T inverses[2];
  read_inverses(call, inverses);
  constexpr int rows = any_threads(a_row) / a_row;
  const int first = simt::thread() % a_row;
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows) {
    const BackwardRow<T> row(call, inverses, r, call.gate_gradient != nullptr && first == 0);
    if (call.gradient == nullptr) continue;
    E* out = static_cast<E*>(call.gradient) + row.out;
    sweep_row<E, a_row>(call, row.view, first, [&](int64_t j, T x) {
      narrow(out + j * call.gradient_layout.stride_class, row.view.scale(call, j) * row.at(call, j, x).logit);
    });
  }
}

// With sums over rows: as backward_columns, but what a row's columns share is worked out once for a block, in shared
// memory.
constexpr int row_columns_together = 32;  // rows

template <class E, class T>
LTK_KERNEL(column_threads, sizeof(T) == 8 ? 3 : 6)
row_backward_columns(const RowCall<T> call) {
  T inverses[2];
  read_inverses(call, inverses);
  BackwardRow<T>* shared_rows = reinterpret_cast<BackwardRow<T>*>(simt::shared_memory() + shared_header);
  const int64_t splits = simt::blocks(), end = call.rows * (simt::block() + 1) / splits;
  for (int64_t begin = int64_t(simt::tile()) * column_threads; begin < call.classes;
       begin += int64_t(simt::tiles()) * column_threads) {
    const int64_t j = begin + simt::thread();
    T scale_sum = T(0), bias_sum = T(0);
    for (int64_t first = call.rows * simt::block() / splits; first < end; first += row_columns_together) {
      const int count = int(end - first < row_columns_together ? end - first : row_columns_together);
      if (simt::thread() < count)
        shared_rows[simt::thread()] =
            BackwardRow<T>(call, inverses, first + simt::thread(), call.gate_gradient != nullptr && begin == 0);
      simt::sync_block();
      for (int i = 0; i < count && j < call.classes; ++i) {
        const BackwardRow<T>& row = shared_rows[i];
        const auto d = row.at(call, j, row.view.template logit<E>(call, j));
        const T by = call.gate != nullptr ? row.view.gate : T(1);
        bias_sum += by * d.bias;
        scale_sum += by * d.scale;
        if (call.gradient != nullptr)
          narrow(static_cast<E*>(call.gradient) + row.out + j * call.gradient_layout.stride_class,
                 row.view.scale(call, j) * d.logit);
      }
      simt::sync_block();
    }
    finish_columns(call, begin, scale_sum, bias_sum);
  }
}

}  // namespace ltk::cuda
