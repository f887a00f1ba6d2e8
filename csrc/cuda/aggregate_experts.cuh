// The kernels of the experts' weighted mean: one launch each way, one more for weights by class.
//
// Threads share a sample, each with the same columns of all its experts' rows. Forward: where the mean is not of
// logits, a sweep makes each expert's softmax; the next makes the mean, and finds the best class if it is wanted; each
// class more takes another. Backward: with f_e what the mean is of, share_e = w_e / sum w and G_e = sum_j g f_e,
//   logits      dl/dz_e = share_e g
//   probs       dl/dz_e = p_e (share_e g - R_e)      R_e = sum_j share_e g p_e
//   log_probs   dl/dz_e = share_e g - p_e R_e        R_e = sum_j share_e g
//   weights     dl/dw_e = (G_e - sum_k share_k G_k) / sum w      G summed over what the weight is shared by.
#pragma once

#include <cmath>

#include "cuda/aggregate_experts.h"
#include "cuda/batch.cuh"
#include "cuda/expert_rows.cuh"
#include "cuda/online_sum.cuh"

namespace ltk::cuda {

// --- Weights and values ---

// The weight of an expert in all columns of a sample, and one over the sum of all experts'; 1 for weights by class.
template <class T>
LTK_DEVICE T weight_of(const AggregateCall<T>& call, int64_t i, int64_t e) {
  if (call.weights == ExpertWeights::expert) return call.expert_weight[e];
  return call.weights == ExpertWeights::sample ? call.expert_weight[i * call.experts + e] : T(1);
}
template <class T>
LTK_DEVICE T inverse_total_of(const AggregateCall<T>& call, int64_t i) {
  if (call.by_class()) return T(1);
  T total = T(0);
  for (int64_t e = 0; e < call.experts; ++e) total += weight_of(call, i, e);
  return T(1) / total;
}

// What an expert adds to a sample's mean.
template <class T>
struct ExpertValue {
  T weight, max, inverse_sum, log_sum;

  LTK_DEVICE ExpertValue() {}
  LTK_DEVICE ExpertValue(const AggregateCall<T>& call, int64_t i, int64_t e)
      : weight(weight_of(call, i, e)), max(T(0)), inverse_sum(T(1)), log_sum(T(0)) {
    if (call.mode == AggregateMode::logits) return;
    max = call.softmax(i, e)[0];
    inverse_sum = call.softmax(i, e)[1];
    if (call.mode == AggregateMode::log_probs) log_sum = -std::log(inverse_sum);
  }
  LTK_DEVICE T probability(T z) const { return inverse_sum * simt::exp2(exponent(z, log2_e<T>, max)); }
  LTK_DEVICE T at(const AggregateCall<T>& call, T z) const {
    return call.mode == AggregateMode::probs ? probability(z) : (z - max) - log_sum;
  }
};

// The weights of an expert in a part of a group of columns, and one over the sum of all experts'. `uniform` is what all
// columns of the sample have in common: the whole of it, or for weights by class a factor.
template <class T, class C, class Group, int part>
LTK_DEVICE void read_weights(const AggregateCall<T>& call, const C& columns, int64_t e, T uniform, Group group,
                             int from, T (&weight)[part]) {
  if (call.by_class()) return columns.read(call.expert_weight + e * call.classes, group, from, T(1), weight);
#pragma unroll
  for (int k = 0; k < part; ++k) weight[k] = uniform;
}
template <class T, class C, class Group, int part>
LTK_DEVICE void read_inverse_totals(const AggregateCall<T>& call, const C& columns, T uniform, Group group, int from,
                                    T (&inverse)[part]) {
#pragma unroll
  for (int k = 0; k < part; ++k) inverse[k] = uniform;
  if (!call.by_class()) return;
  T total[part] = {};
  for (int64_t e = 0; e < call.experts; ++e) {
    T weight[part];
    read_weights(call, columns, e, uniform, group, from, weight);
#pragma unroll
    for (int k = 0; k < part; ++k) total[k] += weight[k];
  }
#pragma unroll
  for (int k = 0; k < part; ++k) inverse[k] /= total[k];
}

// value, which counts for nothing where it has no share, even if it is infinite or NaN.
template <class T>
LTK_DEVICE T counted(T share, T value) {
  return share == T(0) && !(value - value == T(0)) ? T(0) : value;
}

// --- Forward ---

// A class and its value in the mean; before all classes none.
template <class T>
struct Best {
  T value = T(0);
  int64_t place = -1;

  // Whether this comes before the other: NaN first, as torch sorts, of equal ones the first.
  LTK_DEVICE bool before(const Best& other) const {
    if (place < 0 || other.place < 0) return place >= 0;
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan) return nan;
    return nan || value == other.value ? place < other.place : value > other.value;
  }
};

// The best of the threads that share a sample; each gets it.
template <int a_row, class T>
LTK_DEVICE void reduce_best(Best<T>* best) {
  const auto take = [best](const Best<T>& other) {
    if (other.before(*best)) *best = other;
  };
  if constexpr (a_row > 1) {
#pragma unroll
    for (int mask = simt::warp_size / 2; mask > 0; mask /= 2)
      take(Best<T>{simt::exchange(best->value, mask), simt::exchange(best->place, mask)});
  }
  if constexpr (a_row > simt::warp_size) {
    constexpr int warps = a_row / simt::warp_size;
    static_assert(warps * sizeof(Best<T>) <= reduced_bytes<T>, "");
    Best<T>* slots = reinterpret_cast<Best<T>*>(simt::shared_memory() + shared_header);
    simt::sync_block();  // the memory may still be read for what was reduced before
    if (lane() == 0) slots[warp()] = *best;
    simt::sync_block();
    for (int w = 0; w < warps; ++w) take(slots[w]);
  }
}

template <class E, class T, int a_row, bool vectors>
struct AggregateSample {
  using C = Columns<E, T, vectors>;
  static constexpr int count = C::count, part = C::part;

  const AggregateCall<T>& call;
  const int64_t i;
  const int thread;
  const ExpertRows<E> rows;
  E* const out;
  const C columns;

  LTK_DEVICE AggregateSample(const AggregateCall<T>& call, int64_t i, int thread)
      : call(call),
        i(i),
        thread(thread),
        rows(call.input, call.input_layout, i),
        out(static_cast<E*>(call.output) + i * call.classes),
        columns(out, call.classes, thread, a_row) {}

  LTK_DEVICE int64_t number_from(int64_t first) const {
    const int64_t left = call.experts - first;
    return left < experts_at_once ? left : experts_at_once;
  }

  // The experts' softmaxes, to the state: every thread writes them, for it is to read them again.
  LTK_DEVICE void find_softmaxes() const {
    for (int64_t first = 0; first < call.experts; first += experts_at_once) {
      const int64_t number = number_from(first);
      OnlineSum<T> sums[experts_at_once];
      for (auto group = columns.begin; group < columns.end; group += columns.step) {
        const HeldExperts<E, C> some(rows, columns, first, number, group);
#pragma unroll
        for (int from = 0; from < count; from += part) {
#pragma unroll
          for (int e = 0; e < experts_at_once; ++e) {
            if (e >= number) break;
            T z[part];
            columns.decode(some.held[e], from, z);
#pragma unroll
            for (int k = 0; k < part; ++k) z[k] = columns.inside(group, from + k) ? z[k] : -T(INFINITY);
            sums[e].add(z);
          }
        }
      }
      T maxima[experts_at_once], totals[experts_at_once];
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) maxima[e] = sums[e].max;
      reduce_rows<a_row, true>(maxima);
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) {
        sums[e].rise(maxima[e]);
        totals[e] = sums[e].sum;
      }
      reduce_rows<a_row, false>(totals);
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) {
        if (e >= number) break;
        call.softmax(i, first + e)[0] = maxima[e];
        call.softmax(i, first + e)[1] = T(1) / totals[e];
      }
    }
  }

  // The mean of all experts in a group of columns, of which `values` has the first experts'.
  LTK_DEVICE void find_mean(const ExpertValue<T> (&values)[experts_at_once], T inverse_total, decltype(C::begin) group,
                            T (&mean)[count]) const {
#pragma unroll
    for (T& value : mean) value = T(0);
    const auto add = [&](int64_t e, const typename C::Held& held, const ExpertValue<T>& value) {
#pragma unroll
      for (int from = 0; from < count; from += part) {
        T z[part], weight[part];
        columns.decode(held, from, z);
        read_weights(call, columns, e, value.weight, group, from, weight);
#pragma unroll
        for (int k = 0; k < part; ++k) mean[from + k] += weight[k] == T(0) ? T(0) : weight[k] * value.at(call, z[k]);
      }
    };
    const int64_t number = number_from(0);
    const HeldExperts<E, C> some(rows, columns, 0, number, group);
#pragma unroll
    for (int e = 0; e < experts_at_once; ++e)
      if (e < number) add(e, some.held[e], values[e]);
    for (int64_t e = number; e < call.experts; ++e)
      add(e, columns.load(rows.row(e), rows.stride_class, group), ExpertValue<T>(call, i, e));
#pragma unroll
    for (int from = 0; from < count; from += part) {
      T inverse[part];
      read_inverse_totals(call, columns, inverse_total, group, from, inverse);
#pragma unroll
      for (int k = 0; k < part; ++k) mean[from + k] *= inverse[k];
    }
  }

  LTK_DEVICE void run() const {
    if (call.mode != AggregateMode::logits) find_softmaxes();
    ExpertValue<T> values[experts_at_once];
#pragma unroll
    for (int e = 0; e < experts_at_once; ++e)
      if (e < call.experts) values[e] = ExpertValue<T>(call, i, e);
    const T inverse_total = inverse_total_of(call, i);
    const bool softens = call.topk > 0 && call.mode != AggregateMode::probs;
    T max[1] = {T(0)}, total[1] = {T(1)};  // of the mean's softmax
    Best<T> last;
    for (int64_t turn = 0; turn == 0 || turn < call.topk; ++turn) {
      Best<T> best;
      OnlineSum<T> sum;
      for (auto group = columns.begin; group < columns.end; group += columns.step) {
        T mean[count];
        find_mean(values, inverse_total, group, mean);
        if (turn == 0) columns.store(out, 1, group, mean);
        if (call.topk == 0) continue;
#pragma unroll
        for (int k = 0; k < count; ++k) {
          if (!columns.inside(group, k)) {
            mean[k] = -T(INFINITY);
            continue;
          }
          const Best<T> one{mean[k], int64_t(columns.column(group, k))};
          if ((turn == 0 || last.before(one)) && one.before(best)) best = one;
        }
        if (turn == 0 && softens) sum.add(mean);
      }
      if (call.topk == 0) return;
      reduce_best<a_row>(&best);
      if (turn == 0 && softens) {
        max[0] = sum.max;
        reduce_rows<a_row, true>(max);
        sum.rise(max[0]);
        total[0] = sum.sum;
        reduce_rows<a_row, false>(total);
      }
      if (thread == 0) write_best(turn, best, softens, max[0], total[0]);
      last = best;
    }
  }

  LTK_DEVICE void write_best(int64_t turn, const Best<T>& best, bool softens, T max, T total) const {
    using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    const int64_t at = i * call.topk + turn;
    static_cast<Integer*>(call.best)[at] = Integer(best.place);
    call.confidence[at] = softens ? simt::exp2(exponent(best.value, log2_e<T>, max)) / total : best.value;
  }
};

template <class T>
constexpr int aggregate_blocks(int threads) {  // on a multiprocessor: so few that nothing spills
  return (sizeof(T) == 8 ? 256 : 512) / threads;
}

template <class E, class T, int a_row, bool vectors>
LTK_KERNEL(any_threads(a_row), (aggregate_blocks<T>(any_threads(a_row))))
aggregate_experts_forward_kernel(const AggregateCall<T> call) {
  constexpr int samples = any_threads(a_row) / a_row;  // of a block at a time
  if (simt::block() == 0 && simt::thread() == 0) *call.end() = T(1);
  for (int64_t i = simt::block() * samples + simt::thread() / a_row; i < call.rows; i += simt::blocks() * samples)
    AggregateSample<E, T, a_row, vectors>(call, i, simt::thread() % a_row).run();
}

// --- Backward ---

template <class E, class T, int a_row, bool vectors>
struct GradientSample {
  using C = Columns<E, T, vectors>;
  static constexpr int count = C::count, part = C::part;

  const AggregateCall<T>& call;
  const int64_t i;
  const int thread;
  const T inverse_total;
  const ExpertRows<E> rows, out;
  const E* const upstream;

  LTK_DEVICE GradientSample(const AggregateCall<T>& call, int64_t i, int thread, T known)
      : call(call),
        i(i),
        thread(thread),
        inverse_total(known * inverse_total_of(call, i)),
        rows(call.input, call.input_layout, i),
        out(call.gradient, call.gradient_layout, i),
        upstream(static_cast<const E*>(call.grad) + call.grad_layout.offset(i)) {}

  // Calls use(from, share, g, z) for the parts of a group of an expert's columns.
  template <class Group, class Use>
  LTK_DEVICE void for_parts(const C& columns, Group group, int64_t e, T weight, const typename C::Held& logits,
                            const typename C::Held& gradients, const T (&inverse)[count], Use use) const {
#pragma unroll
    for (int from = 0; from < count; from += part) {
      T share[part], g[part], z[part];
      columns.decode(logits, from, z);
      columns.decode(gradients, from, g);
      read_weights(call, columns, e, weight, group, from, share);
#pragma unroll
      for (int k = 0; k < part; ++k) share[k] *= inverse[from + k];
      use(from, share, g, z);
    }
  }
  template <class Group>
  LTK_DEVICE void read_inverses(const C& columns, Group group, T (&inverse)[count]) const {
#pragma unroll
    for (int from = 0; from < count; from += part) {
      T of_part[part];
      read_inverse_totals(call, columns, inverse_total, group, from, of_part);
#pragma unroll
      for (int k = 0; k < part; ++k) inverse[from + k] = of_part[k];
    }
  }

  // R_e and G_e of the experts from `first` on. They do not depend on where the gradient lies.
  LTK_DEVICE void find_sums(int64_t first, int64_t number, const ExpertValue<T> (&values)[experts_at_once],
                            T (&of_row)[experts_at_once], T (&of_weight)[experts_at_once]) const {
    const C columns(rows.row(0), call.classes, thread, a_row);
    for (auto group = columns.begin; group < columns.end; group += columns.step) {
      const HeldExperts<E, C> some(rows, columns, first, number, group);
      const typename C::Held gradients = columns.load(upstream, call.grad_layout.stride_class, group);
      T inverse[count];
      read_inverses(columns, group, inverse);
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) {
        if (e >= number) break;
        for_parts(columns, group, first + e, values[e].weight, some.held[e], gradients, inverse,
                  [&](int from, const T(&share)[part], const T(&g)[part], const T(&z)[part]) {
#pragma unroll
                    for (int k = 0; k < part; ++k) {
                      if (!columns.inside(group, from + k)) continue;
                      const T f = counted(share[k], values[e].at(call, z[k]));
                      of_weight[e] += g[k] * f;
                      of_row[e] += share[k] * g[k] * (call.mode == AggregateMode::probs ? f : T(1));
                    }
                  });
      }
    }
    reduce_rows<a_row, false>(of_row);
    if (call.sums_weights()) reduce_rows<a_row, false>(of_weight);
  }

  LTK_DEVICE void write_gradients(int64_t first, int64_t number, const ExpertValue<T> (&values)[experts_at_once],
                                  const T (&of_row)[experts_at_once]) const {
    const C columns(out.row(0), call.classes, thread, a_row);
    for (auto group = columns.begin; group < columns.end; group += columns.step) {
      const HeldExperts<E, C> some(rows, columns, first, number, group);
      const typename C::Held gradients = columns.load(upstream, call.grad_layout.stride_class, group);
      T inverse[count];
      read_inverses(columns, group, inverse);
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) {
        if (e >= number) break;
        const bool nothing = !call.by_class() && values[e].weight == T(0);
        T d[count];
        for_parts(columns, group, first + e, values[e].weight, some.held[e], gradients, inverse,
                  [&](int from, const T(&share)[part], const T(&g)[part], const T(&z)[part]) {
#pragma unroll
                    for (int k = 0; k < part; ++k) {
                      T& value = d[from + k] = nothing ? T(0) : share[k] * g[k];
                      if (nothing || call.mode == AggregateMode::logits) continue;
                      const T p = values[e].probability(z[k]);
                      value = call.mode == AggregateMode::probs ? p * (value - of_row[e]) : value - p * of_row[e];
                    }
                  });
        columns.store(out.row(first + e), out.stride_class, group, d);
      }
    }
  }

  LTK_DEVICE void run() const {
    const bool sums_weights = call.sums_weights();
    T* const sums = (call.weights == ExpertWeights::sample ? call.weight_sums : call.terms) + i * call.experts;
    T weighted = T(0);  // sum_k share_k G_k
    for (int64_t first = 0; first < call.experts; first += experts_at_once) {
      const int64_t left = call.experts - first, number = left < experts_at_once ? left : experts_at_once;
      ExpertValue<T> values[experts_at_once];
      T of_row[experts_at_once], of_weight[experts_at_once];
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) {
        of_row[e] = of_weight[e] = T(0);
        if (e < number) values[e] = ExpertValue<T>(call, i, first + e);
      }
      if (call.mode != AggregateMode::logits || sums_weights) find_sums(first, number, values, of_row, of_weight);
      if (call.gradient != nullptr) write_gradients(first, number, values, of_row);
      if (!sums_weights || thread != 0) continue;
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e) {
        if (e >= number) break;
        sums[first + e] = of_weight[e];
        weighted += values[e].weight * inverse_total * of_weight[e];
      }
    }
    if (thread != 0 || !sums_weights || call.weights != ExpertWeights::sample) return;
    for (int64_t e = 0; e < call.experts; ++e) sums[e] = (sums[e] - weighted) * inverse_total;
  }
};

// The gradient of weights by expert: a block adds up its samples' terms, and the block that comes last the blocks'.
template <class T>
LTK_DEVICE void finish_weights(const AggregateCall<T>& call, int samples, T known) {
  simt::sync_block();  // the terms are other threads'
  const int64_t experts = call.experts, stride = simt::blocks() * samples;
  for (int64_t e = 0; e < experts; ++e) {
    Totals mine{0.0, 0.0};
    for (int64_t at = simt::thread(); at / samples * stride < call.rows; at += simt::threads()) {
      const int64_t i = at / samples * stride + simt::block() * samples + at % samples;
      if (i < call.rows) mine.a += double(call.terms[i * experts + e]);
    }
    const Totals all = block_sum(mine);
    if (simt::thread() == 0) call.partials[simt::block() * experts + e] = all.a;
  }
  if (!last_block(call.tickets, simt::blocks())) return;
  const double inverse_total = double(known * inverse_total_of(call, 0));
  double weighted = 0.0;
  for (int64_t e = 0; e < experts; ++e) {
    Totals mine{0.0, 0.0};
    for (int64_t b = simt::thread(); b < simt::blocks(); b += simt::threads()) mine.a += call.partials[b * experts + e];
    const Totals all = block_sum(mine);
    weighted += double(call.expert_weight[e]) * inverse_total * all.a;
    if (simt::thread() == 0) call.partials[e] = all.a;
  }
  if (simt::thread() != 0) return;
  for (int64_t e = 0; e < experts; ++e) call.weight_sums[e] = T((call.partials[e] - weighted) * inverse_total);
}

template <class E, class T, int a_row, bool vectors>
LTK_KERNEL(any_threads(a_row), (aggregate_blocks<T>(any_threads(a_row))))
aggregate_experts_backward_kernel(const AggregateCall<T> call) {
  constexpr int samples = any_threads(a_row) / a_row;
  const T known = read_inverse_denominator(call, call.end());  // 1
  for (int64_t i = simt::block() * samples + simt::thread() / a_row; i < call.rows; i += simt::blocks() * samples)
    GradientSample<E, T, a_row, vectors>(call, i, simt::thread() % a_row, known).run();
  if (call.sums_weights() && call.weights == ExpertWeights::expert) finish_weights(call, samples, known);
}

// The gradient of weights by class: a block has a few columns of all experts, and walks down the samples.
constexpr int weight_columns = 16, weight_threads = 512;

template <class E, class T>
LTK_KERNEL(weight_threads, sizeof(T) == 8 ? 1 : 2)
aggregate_class_weights_kernel(const AggregateCall<T> call) {
  constexpr int lanes = weight_threads / weight_columns;
  const int index = simt::thread() % weight_columns, lane = simt::thread() / weight_columns;
  const int64_t j = simt::block() * weight_columns + index;
  T* slots = reinterpret_cast<T*>(simt::shared_memory() + shared_header);  // [lanes, weight_columns]
  const T known = read_inverse_denominator(call, call.end());
  T total = T(0), weighted = T(0);
  for (int64_t e = 0; e < call.experts; ++e) {
    const T weight = j < call.classes ? call.expert_weight[e * call.classes + j] : T(0);
    T sum = T(0);
#pragma unroll 4
    for (int64_t i = lane; j < call.classes && i < call.rows; i += lanes) {
      const ExpertRows<E> rows(call.input, call.input_layout, i);
      const E* g = static_cast<const E*>(call.grad) + call.grad_layout.offset(i);
      const T z = T(widen(rows.row(e)[j * rows.stride_class]));
      const T f = counted(weight, ExpertValue<T>(call, i, e).at(call, z));
      sum += T(widen(g[j * call.grad_layout.stride_class])) * f;
    }
    slots[lane * weight_columns + index] = sum;
    simt::sync_block();
    if (lane == 0 && j < call.classes) {
      for (int other = 1; other < lanes; ++other) sum += slots[other * weight_columns + index];
      call.weight_sums[e * call.classes + j] = sum;
      total += weight;
      weighted += weight * sum;
    }
    simt::sync_block();
  }
  if (lane != 0 || j >= call.classes) return;
  for (int64_t e = 0; e < call.experts; ++e) {
    T* sum = call.weight_sums + e * call.classes + j;
    *sum = known * (*sum - weighted / total) / total;
  }
}

}  // namespace ltk::cuda
