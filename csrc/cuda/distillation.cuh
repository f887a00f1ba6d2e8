// The kernels of distillation: one launch each way.
//
// Forward: threads share a row of student and teacher, and sweep over both twice: the maxima, then an exponential a
// softmax and logit. The second sweep finds the rows in a cache. Backward: one sweep from the row's state, elementwise.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/distillation_row.h"
#include "common/masked_term.h"
#include "cuda/batch.cuh"
#include "cuda/cross_entropy_any.cuh"
#include "cuda/distillation.h"

namespace ltk::cuda {

// --- The logits of a row ---
//
// A thread takes the logits of both sides in groups of `count` columns: begin, begin + step, ... Past the row's end
// they are -inf, which no maximum and no sum sees, and the column is some column of the row.

// 16 bytes at a time: both sides of one type, classes side by side. Groups lie as the vectors of `base` do: the
// gradient's row in a backward, else the student's.
template <class E, class T, bool backward>
struct VectorPair {
  static constexpr int count = width<E>;
  AlignedRow<E> base, student, teacher;
  int begin, end, step;

  LTK_DEVICE VectorPair(const DistillationCall<T>& call, int64_t r, int first, int threads)
      : base(backward ? call.gradient : call.input, (backward ? call.gradient_layout : call.input_layout).offset(r),
             call.classes),
        student(call.input, call.input_layout.offset(r), call.classes),
        teacher(call.teacher, call.teacher_layout.offset(r), call.classes),
        begin(first),
        end(base.vectors()),
        step(threads) {}
  LTK_DEVICE Vector load(const AlignedRow<E>& row, int v) const {
    return row.shift == base.shift ? row.load(v) : row.load_from(base.first(v));
  }
  LTK_DEVICE void load(int v, T (&z)[count], T (&t)[count]) const {
    const Vector of_student = load(student, v), of_teacher = load(teacher, v);
    decode(of_student, z, E{});
    decode(of_teacher, t, E{});
    if (base.whole(v)) return;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int j = base.first(v) + k;
      if (j < 0 || j >= base.classes) z[k] = t[k] = -T(INFINITY);
    }
  }
  LTK_DEVICE int column(int v, int k) const {
    const int j = base.first(v) + k, last = base.classes - 1;
    return j < 0 ? 0 : j < last ? j : last;
  }
  LTK_DEVICE void store(int v, const T (&d)[count]) const { base.store(v, d); }
};

// Any strides, and a teacher of any type: neighbouring threads at neighbouring columns.
template <class E, class T>
struct AnyPair {
  static constexpr int count = 4;  // loads of either side that are on the way together
  const DistillationCall<T>& call;
  int64_t student, teacher, gradient, begin, end, step;
  int threads;

  LTK_DEVICE AnyPair(const DistillationCall<T>& call, int64_t r, int first, int threads)
      : call(call),
        student(call.input_layout.offset(r)),
        teacher(call.teacher_layout.offset(r)),
        gradient(call.gradient_layout.offset(r)),
        begin(first),
        end(call.classes),
        step(int64_t(count) * threads),
        threads(threads) {}
  template <class F>
  LTK_DEVICE void read(const void* memory, int64_t offset, int64_t stride, int64_t group, T (&x)[count]) const {
    const F* row = static_cast<const F*>(memory) + offset;
#pragma unroll
    for (int k = 0; k < count; ++k)
      x[k] = group + k * threads < end ? T(widen(row[column(group, k) * stride])) : -T(INFINITY);
  }
  LTK_DEVICE void load(int64_t group, T (&z)[count], T (&t)[count]) const {
    read<E>(call.input, student, call.input_layout.stride_class, group, z);
    const int64_t stride = call.teacher_layout.stride_class;
    switch (call.teacher_type) {
      case ElementType::f64:
        return read<double>(call.teacher, teacher, stride, group, t);
      case ElementType::f32:
        return read<float>(call.teacher, teacher, stride, group, t);
      case ElementType::bf16:
        return read<BFloat16>(call.teacher, teacher, stride, group, t);
      default:
        return read<Float16>(call.teacher, teacher, stride, group, t);
    }
  }
  LTK_DEVICE int64_t column(int64_t group, int k) const {
    return group + k * threads < end ? group + k * threads : end - 1;
  }
  LTK_DEVICE void store(int64_t group, const T (&d)[count]) const {
    E* row = static_cast<E*>(call.gradient) + gradient;
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (group + k * threads < end) narrow(row + column(group, k) * call.gradient_layout.stride_class, d[k]);
  }
};

template <class E, class T, bool vectors, bool backward>
using Pair = std::conditional_t<vectors, VectorPair<E, T, backward>, AnyPair<E, T>>;

// use(j, z_j, t_j) for the columns of a thread.
template <class T, class P, class Use>
LTK_DEVICE void sweep_pair(const P& pair, Use use) {
  for (auto group = pair.begin; group < pair.end; group += pair.step) {
    T z[P::count], t[P::count];
    pair.load(group, z, t);
#pragma unroll
    for (int k = 0; k < P::count; ++k) use(pair.column(group, k), z[k], t[k]);
  }
}

// The logits of the three softmaxes.
template <class T>
LTK_DEVICE T softened(T x, T scale, const T* bias, int64_t j) {
  return bias != nullptr ? x * scale + bias[j] : x * scale;
}
template <class T>
LTK_DEVICE T student_logit(const DistillationCall<T>& call, int64_t j, T z) {
  return softened(z, call.student_scale, call.student_bias, j);
}
template <class T>
LTK_DEVICE T teacher_logit(const DistillationCall<T>& call, int64_t j, T t) {
  return softened(t, call.teacher_scale, call.teacher_bias, j);
}
template <class T>
LTK_DEVICE T label_logit(const DistillationCall<T>& call, int64_t j, T z) {
  return call.bias != nullptr ? z + call.bias[j] : z;
}

// Without a target no row has a label, as where it is ignored.
template <class T>
LTK_DEVICE Label optional_label(const DistillationCall<T>& call, int64_t r) {
  return call.target != nullptr ? read_label(call, r) : Label{-1, true, 0};
}

// --- Forward ---

template <class E, class T, int a_row, bool vectors>
LTK_DEVICE void forward_row(const DistillationCall<T>& call, int64_t r, int first, Totals* labels, Totals* rows) {
  const Pair<E, T, vectors, false> pair(call, r, first, a_row);
  const Label label = optional_label(call, r);
  const bool with_ce = !label.ignored && label.error == 0;
  T max = -T(INFINITY), teacher_max = -T(INFINITY), ce_max = -T(INFINITY);
  sweep_pair<T>(pair, [&](int64_t j, T z, T t) {
    const T a = student_logit(call, j, z), b = teacher_logit(call, j, t);
    max = a > max ? a : max;
    teacher_max = b > teacher_max ? b : teacher_max;
    if (!with_ce) return;
    const T c = label_logit(call, j, z);
    ce_max = c > ce_max ? c : ce_max;
  });
  max = row_max<a_row>(max);
  teacher_max = row_max<a_row>(teacher_max);
  if (with_ce) ce_max = row_max<a_row>(ce_max);

  DistillationSums<T> sums{};
  T others = T(0);
  sweep_pair<T>(pair, [&](int64_t j, T z, T t) {
    const T a = student_logit(call, j, z) - max, b = teacher_logit(call, j, t) - teacher_max;
    const T ea = simt::exp2(a * log2_e<T>), eb = simt::exp2(b * log2_e<T>);
    sums.student += ea;
    sums.teacher += eb;
    sums.excess += ea - eb;
    sums.distance += eb != T(0) ? eb * (b - a) : T(0);  // what the teacher rules out adds nothing, even a = -inf
    if (with_ce && j != label.y) others += simt::exp2(exponent(label_logit(call, j, z), log2_e<T>, ce_max));
  });
  sums.student = row_sum<a_row>(sums.student);
  sums.teacher = row_sum<a_row>(sums.teacher);
  sums.excess = row_sum<a_row>(sums.excess);
  sums.distance = row_sum<a_row>(sums.distance);
  if (with_ce) others = row_sum<a_row>(others);
  if (first != 0) return;

  const T weight = call.row_weight != nullptr ? call.row_weight[r] : T(1);
  const T kd = masked_term(call.kd_weight * weight, divergence(sums));
  DistillationRow<T> state{max, T(1) / sums.student, teacher_max, T(1) / sums.teacher, T(0), T(0), T(0)};
  T ce = T(0);
  if (with_ce) {
    const T own = AnyRow<E, T>(call, r).adjusted(label.y);
    const T at_label = simt::exp2(exponent(own, log2_e<T>, ce_max));
    state.ce_max = ce_max;
    ce = masked_term(call.ce_weight * weight, finish_label(others, at_label, ce_max - own, &state));
  } else if (label.error != 0) {
    *call.error = label.error;
    ce = state.ce_inverse_sum = state.at_label = T(NAN);
  }
  reinterpret_cast<DistillationRow<T>*>(call.state)[r] = state;
  if (call.reduction == Reduction::none) call.loss[r] = kd + ce;
  labels->a += double(ce);
  labels->b += call.target == nullptr || !label.ignored ? 1.0 : 0.0;  // no labels: a mean of 0 all the same
  rows->a += double(kd);
  rows->b += 1.0;
}

template <class T, bool vectors>
constexpr int distillation_blocks(int threads) {  // on a multiprocessor: so few that nothing spills
  return (sizeof(T) == 8 ? 512 : vectors ? 768 : 1024) / threads;
}

template <class E, class T, int a_row, bool vectors>
LTK_KERNEL(any_threads(a_row), (distillation_blocks<T, vectors>(any_threads(a_row))))
distillation_forward_kernel(const DistillationCall<T> call) {
  constexpr int rows = any_threads(a_row) / a_row;  // of a block at a time
  Totals totals[2] = {};
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows)
    forward_row<E, T, a_row, vectors>(call, r, simt::thread() % a_row, &totals[0], &totals[1]);
  finish_batch(call, totals, 2, call.inverses());
}

// --- Backward ---

constexpr int distillation_threads = 256;

// No row is summed over: one kernel for any number of threads that share a row, of one tile of the grid or several.
template <class E, class T, bool vectors>
LTK_KERNEL(distillation_threads, (distillation_blocks<T, vectors>(distillation_threads)))
distillation_backward_kernel(const DistillationCall<T> call) {
  const T inverse_labels = call.inverses()[0], inverse_rows = read_inverse_denominator(call, call.inverses() + 1);
  const int a_row = call.threads_a_row, rows = distillation_threads / a_row;
  const int first = simt::tile() * a_row + simt::thread() % a_row;
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows) {
    using P = Pair<E, T, vectors, true>;
    const P pair(call, r, first, a_row * simt::tiles());
    const Label label = optional_label(call, r);
    const DistillationRow<T> state = reinterpret_cast<const DistillationRow<T>*>(call.state)[r];
    const T upstream =
        call.upstream[call.upstream_layout.offset(r)] * (call.row_weight != nullptr ? call.row_weight[r] : T(1));
    const T kd = call.kd_weight * inverse_rows * call.student_scale * upstream;
    const T student = kd * state.inverse_sum, teacher = kd * state.teacher_inverse_sum;
    const T ce_factor = call.ce_weight * inverse_labels * upstream;
    const T ce = ce_factor * state.ce_inverse_sum, at_label = ce_factor * state.at_label;
    for (auto group = pair.begin; group < pair.end; group += pair.step) {
      T z[P::count], t[P::count], d[P::count];
      pair.load(group, z, t);
#pragma unroll
      for (int k = 0; k < P::count; ++k) {
        const int64_t j = pair.column(group, k);
        d[k] = student * simt::exp2(exponent(student_logit(call, j, z[k]), log2_e<T>, state.max)) -
               teacher * simt::exp2(exponent(teacher_logit(call, j, t[k]), log2_e<T>, state.teacher_max));
        if (label.ignored) continue;  // a wrong label's factors are NaN
        d[k] +=
            j == label.y ? at_label : ce * simt::exp2(exponent(label_logit(call, j, z[k]), log2_e<T>, state.ce_max));
      }
      pair.store(group, d);
    }
  }
}

}  // namespace ltk::cuda
