// Every call: any strides, double precision, probabilities. One element at a time, neighbouring threads at neighbouring
// columns, or, where classes are strided and rows lie side by side, at neighbouring rows. And the backward that also
// sums over rows.
#pragma once

#include "cuda/batch.cuh"
#include "cuda/elements.cuh"

namespace ltk::cuda {

// The threads that share a row: 1, 32 or 256.
template <int count, class T>
LTK_DEVICE T row_sum(T value) {
  if (count == 1) return value;
  value = simt::warp_sum(value);
  if (count == simt::warp_size) return value;
  double* slots = shared().row;
  simt::sync_block();  // the memory may still be read for the value before
  if (lane() == 0) slots[warp()] = double(value);
  simt::sync_block();
  T sum = T(0);
  for (int w = 0; w < count / simt::warp_size; ++w) sum += T(slots[w]);
  return sum;
}
template <int count, class T>
LTK_DEVICE T row_max(T value) {
  if (count == 1) return value;
  value = simt::warp_max(value);
  if (count == simt::warp_size) return value;
  double* slots = shared().row;
  simt::sync_block();
  if (lane() == 0) slots[warp()] = double(value);
  simt::sync_block();
  for (int w = 0; w < count / simt::warp_size; ++w) value = T(slots[w]) > value ? T(slots[w]) : value;
  return value;
}

LTK_HOST_DEVICE_MEMBER constexpr int any_threads(int a_row) { return a_row == 256 ? 256 : 128; }
template <class T>
constexpr int any_blocks(int a_row) {  // on a multiprocessor: doubles take two registers each
  return (sizeof(T) == 8 ? 512 : 1024) / any_threads(a_row);
}

template <class E, class T>
struct AnyRow {
  const Call<T>& call;
  const E* x;

  LTK_DEVICE AnyRow(const Call<T>& call, int64_t row)
      : call(call), x(static_cast<const E*>(call.input) + call.input_layout.offset(row)) {}
  LTK_DEVICE T logit(int64_t j) const { return T(widen(x[j * call.input_layout.stride_class])); }
  LTK_DEVICE T adjusted(int64_t j) const {
    T u = logit(j);
    if (call.scale != nullptr) u *= call.scale[j];
    if (call.bias != nullptr) u += call.bias[j];
    return u;
  }
};

template <class T>
LTK_DEVICE T probability_at(const void* target, ElementType type, int64_t offset) {
  switch (type) {
    case ElementType::f64:
      return T(static_cast<const double*>(target)[offset]);
    case ElementType::f32:
      return T(static_cast<const float*>(target)[offset]);
    case ElementType::bf16:
      return T(widen(static_cast<const BFloat16*>(target)[offset]));
    default:
      return T(widen(static_cast<const Float16*>(target)[offset]));
  }
}

template <class E, class T, int a_row>
LTK_DEVICE void forward_label(const Call<T>& call, const RowOptions<T>& options, int64_t r, int first, Totals* totals) {
  const Label label = read_label(call, r);
  if (label.ignored || label.error != 0) {
    if (first == 0) add_row_without_logits(call, r, label, totals);
    return;
  }
  const int64_t y = label.y;
  const AnyRow<E, T> row(call, r);
  const T scale2 = call.uniform_scale * log2_e<T>;
  const T label_logit = row.adjusted(y) - margin_of(call, y);
  T max = label_logit;
  for (int64_t j = first; j < call.classes; j += a_row) {
    const T u = row.adjusted(j);
    max = j != y && u > max ? u : max;
  }
  max = row_max<a_row>(max);
  const bool smoothing = options.label_smoothing > T(0);
  T others = T(0), smooth_distance = T(0);
  for (int64_t j = first; j < call.classes; j += a_row) {
    if (j == y) continue;
    const T u = row.adjusted(j);
    others += simt::exp2(exponent(u, scale2, max));
    if (smoothing) smooth_distance += weighted(smoothing_weight(call, j), max - u);
  }
  others = row_sum<a_row>(others);
  if (smoothing) smooth_distance = row_sum<a_row>(smooth_distance);
  if (first != 0) return;
  const T scale = call.uniform_scale, below = scale * (max - label_logit);
  const T smooth_weight = smoothing ? smoothing_weight(call, y) : T(0);
  RowState<T> state;
  const T loss = finish_label_row(scale * max, others, simt::exp2(exponent(label_logit, scale2, max)), below,
                                  scale * smooth_distance + weighted(smooth_weight, below),
                                  call.weight != nullptr ? call.weight[y] : T(1), smooth_weight,
                                  call.row_weight != nullptr ? call.row_weight[r] : T(1), options, &state);
  state.max = max;
  add_row(call, r, loss, denominator_part(call, r, y), state, totals);
}

template <class E, class T, int a_row>
LTK_DEVICE void forward_probabilities(const Call<T>& call, const RowOptions<T>& options, int64_t r, int first,
                                      Totals* totals) {
  const AnyRow<E, T> row(call, r);
  const T scale2 = call.uniform_scale * log2_e<T>;
  const int64_t offset = call.target_layout.offset(r);
  T max = -T(INFINITY);
  for (int64_t j = first; j < call.classes; j += a_row) {
    const T u = row.adjusted(j);
    max = u > max ? u : max;
  }
  max = row_max<a_row>(max);
  const bool smoothing = options.label_smoothing > T(0);
  T sum = T(0), total = T(0), distance = T(0), weighted_total = T(0), weighted_distance = T(0), smooth = T(0);
  for (int64_t j = first; j < call.classes; j += a_row) {
    const T u = row.adjusted(j), below = max - u;
    const T t = probability_at<T>(call.target, call.target_type, offset + j * call.target_layout.stride_class);
    const T weight = call.weight != nullptr ? call.weight[j] : T(1);
    const T term = weighted(t, below);  // what has no probability or no weight adds nothing, even where u_j = -inf
    sum += simt::exp2(exponent(u, scale2, max));
    total += t;
    distance += term;
    weighted_total += weight * t;
    weighted_distance += weighted(weight, term);
    if (smoothing) smooth += weighted(smoothing_weight(call, j), below);
  }
  sum = row_sum<a_row>(sum);
  total = row_sum<a_row>(total);
  distance = row_sum<a_row>(distance);
  weighted_total = row_sum<a_row>(weighted_total);
  weighted_distance = row_sum<a_row>(weighted_distance);
  smooth = row_sum<a_row>(smooth);
  if (first != 0) return;
  const T scale = call.uniform_scale;
  RowState<T> state;
  const T loss =
      finish_probability_row(scale * max, sum, total, scale * distance, weighted_total, scale * weighted_distance,
                             scale * smooth, call.row_weight != nullptr ? call.row_weight[r] : T(1), options, &state);
  state.max = max;
  add_row(call, r, loss, denominator_part(call, r, int64_t(-1)), state, totals);
}

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), any_blocks<T>(a_row))
forward_any(const Call<T> call) {
  RowOptions<T> options = call.options;
  count_smoothing(call, &options);
  constexpr int rows = any_threads(a_row) / a_row;  // of a block at a time
  const int first = simt::thread() % a_row;
  Totals totals{0.0, 0.0};
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows) {
    if (is_floating(call.target_type))
      forward_probabilities<E, T, a_row>(call, options, r, first, &totals);
    else
      forward_label<E, T, a_row>(call, options, r, first, &totals);
  }
  finish_batch(call, totals);
}

// The gradient of the loss of one row, as far as all its columns share it.
template <class T>
struct RowGradient {
  T max, probability, hard, raw, smooth, at_label, factor;
  int64_t y;  // -1 for probabilities
  bool ignored;
  const void* target;
  int64_t target_offset;

  LTK_DEVICE RowGradient(const Call<T>& call, const RowOptions<T>& options, int64_t r, T inverse_denominator)
      : y(-1), ignored(false), target(call.target), target_offset(0) {
    if (!is_floating(call.target_type)) {
      const Label label = read_label(call, r);
      y = label.y;
      ignored = label.ignored;
    } else {
      target_offset = call.target_layout.offset(r);
    }
    const RowState<T> state = read_state(call, r);
    factor = call.uniform_scale * inverse_denominator * call.upstream[call.upstream_layout.offset(r)];
    max = state.max;
    probability = factor * state.probability;
    hard = factor * state.factor * (T(1) - options.label_smoothing);
    raw = at_label = factor * state.at_label;
    smooth = factor * state.factor * options.smoothing_per_class;
  }
  // s dl/du_j: what flows to the bias of class j.
  LTK_DEVICE T at(const Call<T>& call, int64_t j, T adjusted) const {
    if (ignored) return T(0);
    if (j == y) return at_label;
    T d = probability * simt::exp2(exponent(adjusted, call.uniform_scale * log2_e<T>, max));
    if (y < 0 && is_floating(call.target_type)) {
      const T t = probability_at<T>(target, call.target_type, target_offset + j * call.target_layout.stride_class);
      d -= t * (hard * (call.weight != nullptr ? call.weight[j] : T(1)) + raw);
    }
    if (call.options.label_smoothing > T(0)) d -= smooth * smoothing_weight(call, j);
    return d;
  }
};

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), any_blocks<T>(a_row))
backward_any(const Call<T> call) {
  RowOptions<T> options = call.options;
  count_smoothing(call, &options);
  const T inverse_denominator = read_inverse_denominator(call);
  constexpr int rows = any_threads(a_row) / a_row;
  const int first = simt::thread() % a_row;
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows) {
    const AnyRow<E, T> row(call, r);
    const RowGradient<T> gradient(call, options, r, inverse_denominator);
    E* out = static_cast<E*>(call.gradient) + call.gradient_layout.offset(r);
    for (int64_t j = first; j < call.classes; j += a_row) {
      const T d = gradient.at(call, j, row.adjusted(j));
      narrow(out + j * call.gradient_layout.stride_class, call.scale != nullptr ? call.scale[j] * d : d);
    }
  }
}

// The sums of a split of the rows (a block) for the columns from `begin` on, of which a thread has one. The last split
// adds them up, in the order of the splits.
template <class T>
LTK_DEVICE void finish_columns(const Call<T>& call, int64_t begin, T scale_sum, T bias_sum) {
  const int64_t splits = simt::blocks(), j = begin + simt::thread();
  if (j < call.classes) {
    if (call.scale_sums != nullptr) call.scale_partials[simt::block() * call.classes + j] = scale_sum;
    if (call.bias_sums != nullptr) call.bias_partials[simt::block() * call.classes + j] = bias_sum;
  }
  if (!last_block(call.tickets + begin / column_threads, splits)) return;
  if (j >= call.classes) return;
  scale_sum = bias_sum = T(0);
  for (int64_t s = 0; s < splits; ++s) {
    if (call.scale_sums != nullptr) scale_sum += call.scale_partials[s * call.classes + j];
    if (call.bias_sums != nullptr) bias_sum += call.bias_partials[s * call.classes + j];
  }
  if (call.scale_sums != nullptr) call.scale_sums[j] = scale_sum;
  if (call.bias_sums != nullptr) call.bias_sums[j] = bias_sum;
}

// With sums over rows: a thread keeps a column and walks down the rows of its block (x: a split of the rows, tile: the
// columns).
template <class E, class T>
LTK_KERNEL(column_threads, sizeof(T) == 8 ? 3 : 6)
backward_columns(const Call<T> call) {
  RowOptions<T> options = call.options;
  count_smoothing(call, &options);
  const T inverse_denominator = read_inverse_denominator(call);
  const int64_t splits = simt::blocks(), split = simt::block();
  for (int64_t begin = int64_t(simt::tile()) * column_threads; begin < call.classes;
       begin += int64_t(simt::tiles()) * column_threads) {
    const int64_t j = begin + simt::thread();
    T scale_sum = T(0), bias_sum = T(0);
    const int64_t end = j < call.classes ? call.rows * (split + 1) / splits : 0;
    // Several rows at once, so that their loads are on the way together.
    constexpr int together = 4;
    for (int64_t first = call.rows * split / splits; first < end; first += together) {
      T x[together], d[together];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        const int64_t r = first + i < end ? first + i : end - 1;
        const AnyRow<E, T> row(call, r);
        const RowGradient<T> gradient(call, options, r, inverse_denominator);
        x[i] = gradient.ignored ? -T(INFINITY) : row.logit(j);
        d[i] = gradient.at(call, j, row.adjusted(j));
      }
#pragma unroll
      for (int i = 0; i < together; ++i) {
        if (first + i >= end) break;
        bias_sum += d[i];
        // Whatever flows to a masked logit, it does not depend on the class's scale: -inf times anything is -inf.
        scale_sum += x[i] == -T(INFINITY) ? T(0) : d[i] * x[i];
        if (call.gradient != nullptr)
          narrow(static_cast<E*>(call.gradient) + call.gradient_layout.offset(first + i) +
                     j * call.gradient_layout.stride_class,
                 call.scale != nullptr ? call.scale[j] * d[i] : d[i]);
      }
    }
    finish_columns(call, begin, scale_sum, bias_sum);
  }
}

}  // namespace ltk::cuda
