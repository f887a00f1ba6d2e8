// The kernels of several experts' losses: one launch each way.
//
// Threads share a sample, each with the same columns of all its experts' rows, so that the mean of the experts is
// computed where it is needed, from logits that are in registers anyway. Forward: two sweeps, maxima and exponentials;
// the second finds the rows in a cache. The backward is in expert_cross_entropy_backward.cuh.
#pragma once

#include <cmath>
#include <limits>

#include "common/distillation_row.h"
#include "common/masked_term.h"
#include "cuda/batch.cuh"
#include "cuda/expert_cross_entropy.h"
#include "cuda/expert_rows.cuh"

namespace ltk::cuda {

template <class T>
LTK_DEVICE T exponential(T distance) {
  return simt::exp2(distance * log2_e<T>);
}

// The label of a sample: wrong too where an expert that has a weight for it does not know its class.
template <class T>
LTK_DEVICE Label expert_label(const ExpertCrossEntropyCall<T>& call, int64_t i) {
  Label label = check_range(call, raw_label(call, i));
  if (label.ignored || label.error != 0 || call.bias == nullptr) return label;
  for (int64_t at = label.y; at < call.experts * call.classes; at += call.classes)
    if (call.bias[at] == -T(INFINITY) && (call.weight == nullptr || call.weight[at] != T(0)))
      label.error = label_of_absent_class;
  return label;
}

template <class T>
LTK_DEVICE T row_weight_of(const ExpertCrossEntropyCall<T>& call, int64_t i) {
  return call.row_weight != nullptr ? call.row_weight[i] : T(1);
}

// What multiplies expert e's cross-entropy of a sample with label y, but for the denominator.
template <class T>
LTK_DEVICE T expert_weight(const ExpertCrossEntropyCall<T>& call, int64_t i, int64_t e, int64_t y) {
  return row_weight_of(call, i) * (call.weight != nullptr ? call.weight[e * call.classes + y] : T(1));
}

// The factor of a sample's divergences from the mean.
template <class T>
LTK_DEVICE T diversity_of(const ExpertCrossEntropyCall<T>& call, int64_t i) {
  return call.diversity * row_weight_of(call, i) *
         (call.temperature != nullptr ? call.temperature[call.classes] : T(1));
}

// u of an expert at one column, and at a part of a group of them.
template <class T>
LTK_DEVICE T adjusted_at(const ExpertCrossEntropyCall<T>& call, int64_t e, int64_t j, T z) {
  if (call.scale != nullptr) z *= call.scale[e * call.classes + j];
  if (call.bias != nullptr) z += call.bias[e * call.classes + j];
  return call.uniform_scale * z;
}
template <class T, class C, class Group, int part>
LTK_DEVICE void adjust(const ExpertCrossEntropyCall<T>& call, const C& columns, int64_t e, Group group, int from,
                       const T (&z)[part], T (&u)[part]) {
  T table[part];
#pragma unroll
  for (int k = 0; k < part; ++k) u[k] = z[k];
  if (call.scale != nullptr) {
    columns.read(call.scale + e * call.classes, group, from, T(1), table);
#pragma unroll
    for (int k = 0; k < part; ++k) u[k] *= table[k];
  }
  if (call.bias != nullptr) {
    columns.read(call.bias + e * call.classes, group, from, T(0), table);
#pragma unroll
    for (int k = 0; k < part; ++k) u[k] += table[k];
  }
#pragma unroll
  for (int k = 0; k < part; ++k) u[k] *= call.uniform_scale;
}

// What softens these columns.
template <class T, class C, class Group, int part>
LTK_DEVICE void read_temperature(const ExpertCrossEntropyCall<T>& call, const C& columns, Group group, int from,
                                 T (&t)[part]) {
  if (call.temperature != nullptr) return columns.read(call.temperature, group, from, T(1), t);
#pragma unroll
  for (int k = 0; k < part; ++k) t[k] = T(1);
}

// The mean of all experts, of which `number` from `first` on are held.
template <class E, class T, class C, class Group, int part>
LTK_DEVICE void mean_of(const ExpertRows<E>& rows, const C& columns, const HeldExperts<E, C>& some, int64_t first,
                        int64_t number, int64_t experts, Group group, int from, T (&mean)[part]) {
#pragma unroll
  for (int k = 0; k < part; ++k) mean[k] = T(0);
  const auto add = [&](const typename C::Held& held) {
    T z[part];
    columns.decode(held, from, z);
#pragma unroll
    for (int k = 0; k < part; ++k) mean[k] += z[k];
  };
#pragma unroll
  for (int k = 0; k < experts_at_once; ++k)
    if (k < number) add(some.held[k]);
  if (number < experts)
    for (int64_t e = 0; e < experts; ++e)
      if (e < first || e >= first + number) add(columns.load(rows.row(e), rows.stride_class, group));
  const T share = T(1) / T(experts);
#pragma unroll
  for (int k = 0; k < part; ++k) mean[k] *= share;
}

// The teacher's logits.
template <class E, class T, class Group, int part>
LTK_DEVICE void read_teacher(const ExpertCrossEntropyCall<T>& call, const VectorColumns<E, T>& columns, int64_t i,
                             Group group, int from, T (&q)[part]) {
  const E* row = static_cast<const E*>(call.teacher) + call.teacher_layout.offset(i);
  columns.decode(columns.load(row, 1, group), from, q);
}
template <class E, class T, class Group, int part>
LTK_DEVICE void read_teacher(const ExpertCrossEntropyCall<T>& call, const AnyColumns<E, T>& columns, int64_t i,
                             Group group, int from, T (&q)[part]) {
  const int64_t offset = call.teacher_layout.offset(i), stride = call.teacher_layout.stride_class;
  const auto read = [&](auto* memory) { columns.decode(columns.load(memory + offset, stride, group), from, q); };
  switch (call.teacher_type) {
    case ElementType::f64:
      return read(static_cast<const double*>(call.teacher));
    case ElementType::f32:
      return read(static_cast<const float*>(call.teacher));
    case ElementType::bf16:
      return read(static_cast<const BFloat16*>(call.teacher));
    default:
      return read(static_cast<const Float16*>(call.teacher));
  }
}

// --- Forward ---

// Cross-entropies, and with e = E the divergences, each to be divided by its own denominator.
template <class T>
LTK_DEVICE double& term_of(const ExpertCrossEntropyCall<T>& call, int64_t i, int64_t e) {
  return call.terms[i * (call.experts + 1) + e];
}

template <class T>
LTK_DEVICE T larger(T a, T b) {
  return b > a ? b : a;
}

// Maxima of some experts' u over the classes other than the label, and of their softened logits.
template <class T>
struct ExpertMaxima {
  T u[experts_at_once], soft[experts_at_once];
};

template <class E, class T, int a_row, bool vectors>
struct ForwardSample {
  using C = Columns<E, T, vectors>;
  static constexpr int part = C::part;

  const ExpertCrossEntropyCall<T>& call;
  const int64_t i;
  const ExpertRows<E> rows;
  const C columns;
  const Label label;
  const typename C::Index y;
  const bool counts, soft;
  T mean_max, mean_sum, divergences;

  LTK_DEVICE ForwardSample(const ExpertCrossEntropyCall<T>& call, int64_t i, int thread)
      : call(call),
        i(i),
        rows(call.input, call.input_layout, i),
        columns(rows.row(0), call.classes, thread, a_row),
        label(expert_label(call, i)),
        y(typename C::Index(label.y)),
        counts(!label.ignored && label.error == 0),
        soft(counts && call.diversity != T(0)),
        mean_max(T(0)),
        mean_sum(T(0)),
        divergences(T(0)) {}

  LTK_DEVICE T label_logit(int64_t e) const { return T(widen(rows.row(e)[y * rows.stride_class])); }

  // First sweep over the experts from `first` on: maxima, with the first of them that of the mean, and the mean
  // itself to memory.
  LTK_DEVICE ExpertMaxima<T> find_maxima(int64_t first, int64_t number) {
    const bool writes = call.mean != nullptr && first == 0;
    const bool with_mean = first == 0 && (writes || soft);
    ExpertMaxima<T> maxima;
    T of_mean[1] = {-T(INFINITY)};
#pragma unroll
    for (int e = 0; e < experts_at_once; ++e) {
      maxima.u[e] = std::numeric_limits<T>::lowest();  // of no other class or none but -inf, from which -inf is NaN
      maxima.soft[e] = -T(INFINITY);
    }
    for (auto group = columns.begin; group < columns.end; group += columns.step) {
      const HeldExperts<E, C> some(rows, columns, first, number, group);
#pragma unroll
      for (int from = 0; from < C::count; from += part) {
        T t[part], z[part], u[part];
        read_temperature(call, columns, group, from, t);
        if (with_mean) {
          T mean[part];
          mean_of(rows, columns, some, first, number, call.experts, group, from, mean);
          if (writes) columns.write(call.mean + i * call.classes, group, from, mean);
#pragma unroll
          for (int k = 0; k < part; ++k)
            if (columns.inside(group, from + k)) of_mean[0] = larger(of_mean[0], t[k] * mean[k]);
        }
        if (!counts) continue;
#pragma unroll
        for (int e = 0; e < experts_at_once; ++e) {
          if (e >= number) break;
          columns.decode(some.held[e], from, z);
          adjust(call, columns, first + e, group, from, z, u);
#pragma unroll
          for (int k = 0; k < part; ++k) {
            if (!columns.inside(group, from + k)) continue;
            if (columns.column(group, from + k) != y) maxima.u[e] = larger(maxima.u[e], u[k]);
            if (soft) maxima.soft[e] = larger(maxima.soft[e], t[k] * z[k]);
          }
        }
      }
    }
    if (!counts) return maxima;
    reduce_rows<a_row, true>(maxima.u);
    if (soft) reduce_rows<a_row, true>(maxima.soft);
    if (soft && first == 0) {
      reduce_rows<a_row, true>(of_mean);
      mean_max = of_mean[0];
    }
    return maxima;
  }

  // Second sweep: a term of the loss and a part of the state for each of these experts.
  LTK_DEVICE void add_experts(int64_t first, int64_t number, const ExpertMaxima<T>& maxima, bool leads) {
    T others[experts_at_once], soft_sums[3 * experts_at_once + 1];
#pragma unroll
    for (int e = 0; e < experts_at_once; ++e) others[e] = T(0);
#pragma unroll
    for (T& sum : soft_sums) sum = T(0);
    for (auto group = columns.begin; group < columns.end; group += columns.step) {
      const HeldExperts<E, C> some(rows, columns, first, number, group);
#pragma unroll
      for (int from = 0; from < C::count; from += part) {
        T t[part], z[part], u[part], b[part], eb[part];
        read_temperature(call, columns, group, from, t);
        if (soft) {
          mean_of(rows, columns, some, first, number, call.experts, group, from, b);
#pragma unroll
          for (int k = 0; k < part; ++k) {
            b[k] = t[k] * b[k] - mean_max;
            eb[k] = columns.inside(group, from + k) ? exponential(b[k]) : T(0);
            soft_sums[3 * experts_at_once] += eb[k];
          }
        }
#pragma unroll
        for (int e = 0; e < experts_at_once; ++e) {
          if (e >= number) break;
          columns.decode(some.held[e], from, z);
          adjust(call, columns, first + e, group, from, z, u);
#pragma unroll
          for (int k = 0; k < part; ++k) {
            if (!columns.inside(group, from + k)) continue;
            if (columns.column(group, from + k) != y) others[e] += exponential(u[k] - maxima.u[e]);
            if (!soft) continue;
            const T a = t[k] * z[k] - maxima.soft[e], ea = exponential(a);
            soft_sums[3 * e] += ea;
            soft_sums[3 * e + 1] += ea - eb[k];
            // What the mean rules out adds nothing, even a = -inf.
            soft_sums[3 * e + 2] += eb[k] != T(0) ? eb[k] * (b[k] - a) : T(0);
          }
        }
      }
    }
    reduce_rows<a_row, false>(others);
    if (soft) reduce_rows<a_row, false>(soft_sums);
    if (soft && first == 0) mean_sum = soft_sums[3 * experts_at_once];
    if (!leads) return;

#pragma unroll
    for (int e = 0; e < experts_at_once; ++e) {
      if (e >= number) break;
      ExpertState<T> state{maxima.u[e], T(0), T(0), T(0), T(0)};
      const int64_t at = (first + e) * call.classes + y;
      const T margin = call.margin != nullptr ? call.uniform_scale * call.margin[at] : T(0);
      const T own = adjusted_at(call, first + e, y, label_logit(first + e)) - margin;
      const T share = expert_weight(call, i, first + e, y);
      term_of(call, i, first + e) = double(finish_cross_entropy(others[e], own, share, &state));
      if (soft) {
        const DistillationSums<T> sums{soft_sums[3 * e], mean_sum, soft_sums[3 * e + 1], soft_sums[3 * e + 2]};
        state.soft_max = maxima.soft[e];
        state.soft_inverse = T(1) / sums.student;
        divergences += masked_term(diversity_of(call, i), divergence(sums));
      }
      call.of_experts(i)[first + e] = state;
    }
  }
};

template <class E, class T, int a_row, bool vectors>
LTK_DEVICE void forward_sample(const ExpertCrossEntropyCall<T>& call, int64_t i, int thread) {
  ForwardSample<E, T, a_row, vectors> of(call, i, thread);
  const bool leads = thread == 0;
  if (!of.counts) {
    if (call.mean != nullptr) of.find_maxima(0, call.experts < experts_at_once ? call.experts : experts_at_once);
    if (!leads) return;
    const T value = of.label.error != 0 ? T(NAN) : T(0);
    if (of.label.error != 0) *call.error = of.label.error;
    T* state = reinterpret_cast<T*>(call.of_experts(i));
    for (int64_t k = 0; k < 5 * call.experts + 6; ++k) state[k] = value;
    for (int64_t e = 0; e < call.experts; ++e) term_of(call, i, e) = 0.0;
    term_of(call, i, call.experts) = double(value);
    return;
  }
  for (int64_t first = 0; first < call.experts; first += experts_at_once) {
    const int64_t left = call.experts - first, number = left < experts_at_once ? left : experts_at_once;
    of.add_experts(first, number, of.find_maxima(first, number), leads);
  }
  if (!leads) return;
  *call.of_sample(i) = {of.mean_max, of.soft ? T(1) / of.mean_sum : T(0), T(0), T(0), T(0), T(0)};
  term_of(call, i, call.experts) = double(of.divergences);
}

// The mean's divergence from the teacher.
template <class E, class T, int a_row, bool vectors>
LTK_DEVICE void distil_sample(const ExpertCrossEntropyCall<T>& call, int64_t i, int thread) {
  using C = Columns<E, T, vectors>;
  constexpr int part = C::part;
  const Label label = expert_label(call, i);
  if (label.ignored || label.error != 0) return;
  const ExpertRows<E> rows(call.input, call.input_layout, i);
  const C columns(rows.row(0), call.classes, thread, a_row);
  const int64_t number = call.experts < experts_at_once ? call.experts : experts_at_once;
  const auto sweep = [&](auto use) {
    for (auto group = columns.begin; group < columns.end; group += columns.step) {
      const HeldExperts<E, C> some(rows, columns, 0, number, group);
#pragma unroll
      for (int from = 0; from < C::count; from += part) {
        T mean[part], q[part];
        mean_of(rows, columns, some, 0, number, call.experts, group, from, mean);
        read_teacher(call, columns, i, group, from, q);
#pragma unroll
        for (int k = 0; k < part; ++k)
          if (columns.inside(group, from + k)) use(call.distillation_scale * mean[k], call.distillation_scale * q[k]);
      }
    }
  };
  T maxima[2] = {-T(INFINITY), -T(INFINITY)};
  sweep([&](T a, T b) {
    maxima[0] = larger(maxima[0], a);
    maxima[1] = larger(maxima[1], b);
  });
  reduce_rows<a_row, true>(maxima);
  T sums[4] = {};
  sweep([&](T a, T b) {
    a -= maxima[0];
    b -= maxima[1];
    const T ea = exponential(a), eb = exponential(b);
    sums[0] += ea;
    sums[1] += eb;
    sums[2] += ea - eb;
    sums[3] += eb != T(0) ? eb * (b - a) : T(0);  // what the teacher rules out adds nothing, even a = -inf
  });
  reduce_rows<a_row, false>(sums);
  if (thread != 0) return;
  SampleState<T>* state = call.of_sample(i);
  *state = {state->mean_max, state->mean_inverse, maxima[0], T(1) / sums[0], maxima[1], T(1) / sums[1]};
  const T kl = divergence(DistillationSums<T>{sums[0], sums[1], sums[2], sums[3]});
  term_of(call, i, call.experts) += double(masked_term(call.distillation * row_weight_of(call, i), kl));
}

// What a sample adds to the denominator of expert e, or with e = E to the number of samples.
template <class T>
LTK_DEVICE double denominator_of(const ExpertCrossEntropyCall<T>& call, int64_t i, int64_t e) {
  const Label label = check_range(call, raw_label(call, i));
  if (label.ignored) return 0.0;
  if (label.error != 0 || e == call.experts || call.reduction == Reduction::mean_count) return 1.0;
  return double(expert_weight(call, i, e, label.y));
}

// Loss and denominators of the batch: a block adds up its samples' terms, which lie in memory since there is no bound
// on their number, and the block that comes last adds up the blocks'. use(i) for the samples of a block:
template <class Use>
LTK_DEVICE void for_samples_of_block(int64_t samples, int rows, Use use) {
  const int64_t stride = simt::blocks() * rows;
  for (int64_t at = simt::thread(); at / rows * stride < samples; at += simt::threads()) {
    const int64_t i = at / rows * stride + simt::block() * rows + at % rows;
    if (i < samples) use(i);
  }
}
template <class T>
LTK_DEVICE void finish_experts(const ExpertCrossEntropyCall<T>& call, int rows) {
  const int64_t experts = call.experts, parts = experts + 1;
  T* inverses = call.inverse_denominators();
  simt::sync_block();  // the terms are other threads'
  if (call.reduction == Reduction::none) {
    for_samples_of_block(call.rows, rows, [&](int64_t i) {
      double loss = 0.0;
      for (int64_t e = 0; e < parts; ++e) loss += term_of(call, i, e);
      call.loss[i] = T(loss);
    });
    for (int64_t e = simt::thread(); simt::block() == 0 && e < parts; e += simt::threads()) inverses[e] = T(1);
    return;
  }
  Totals* partials = reinterpret_cast<Totals*>(call.partials);
  for (int64_t e = 0; e < parts; ++e) {
    Totals mine{0.0, 0.0};
    for_samples_of_block(call.rows, rows, [&](int64_t i) {
      mine.a += term_of(call, i, e);
      mine.b += denominator_of(call, i, e);
    });
    const Totals all = block_sum(mine);
    if (simt::thread() == 0) partials[simt::block() * parts + e] = all;
  }
  if (!last_block(call.tickets, simt::blocks())) return;
  const bool mean = call.reduction != Reduction::sum;
  bool empty = mean;
  double loss = 0.0;
  for (int64_t e = 0; e < parts; ++e) {
    Totals sums{0.0, 0.0};
    for (int64_t b = simt::thread(); b < simt::blocks(); b += simt::threads()) {
      sums.a += partials[b * parts + e].a;
      sums.b += partials[b * parts + e].b;
    }
    const Totals all = block_sum(sums);
    const double inverse = !mean ? 1.0 : all.b != 0.0 ? 1.0 / all.b : 0.0;  // an expert without weight adds nothing
    if (e < experts) empty = empty && inverse == 0.0;
    if (inverse != 0.0) loss += all.a * inverse;
    if (simt::thread() == 0) inverses[e] = T(inverse);
  }
  if (simt::thread() == 0) *call.loss = empty && !call.empty_zero ? T(NAN) : T(loss);
}

template <class T>
constexpr int expert_blocks(int threads) {  // on a multiprocessor: so few that nothing spills
  return (sizeof(T) == 8 ? 256 : 512) / threads;
}

template <class E, class T, int a_row, bool vectors>
LTK_KERNEL(any_threads(a_row), (expert_blocks<T>(any_threads(a_row))))
expert_cross_entropy_forward_kernel(const ExpertCrossEntropyCall<T> call) {
  constexpr int rows = any_threads(a_row) / a_row;  // of a block at a time
  const int64_t begin = simt::block() * rows + simt::thread() / a_row;
  for (int64_t i = begin; i < call.rows; i += simt::blocks() * rows)
    forward_sample<E, T, a_row, vectors>(call, i, simt::thread() % a_row);
  // In a loop of its own, for which the experts' leaves no registers. Most blocks have one sample: it is in a cache.
  for (int64_t i = begin; i < call.rows && call.teacher != nullptr; i += simt::blocks() * rows)
    distil_sample<E, T, a_row, vectors>(call, i, simt::thread() % a_row);
  finish_experts(call, rows);
}

}  // namespace ltk::cuda
