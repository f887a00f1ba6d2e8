// The backward of several experts' losses: one sweep from the samples' states, elementwise. With t what softens logits,
//   dl/dz_j = s a_ej w (p_j - [j = y]) + lambda t_j softmax(t z)_j + common_j,
//   common_j = -lambda t_j softmax(t zbar)_j + kappa tau (softmax(tau zbar)_j - q_j) / E,
// whose last line is the same for all experts.
#pragma once

#include "cuda/expert_cross_entropy.cuh"

namespace ltk::cuda {

// What multiplies the exponentials of an expert's logits, and its own part at the label.
template <class T>
struct ExpertFactors {
  T max, of_u, soft_max, of_soft, at_label;

  LTK_DEVICE ExpertFactors() {}
  LTK_DEVICE ExpertFactors(const ExpertCrossEntropyCall<T>& call, int64_t i, int64_t e, int64_t y, T upstream, T kl) {
    const ExpertState<T> state = call.of_experts(i)[e];
    const T share = expert_weight(call, i, e, y) * call.inverse_denominators()[e] * upstream * call.uniform_scale;
    max = state.max;
    of_u = share * state.factor;
    at_label = share * state.at_label;
    soft_max = state.soft_max;
    of_soft = kl * state.soft_inverse;
  }
};

constexpr int expert_backward_threads = 256;

// No row is summed over: one kernel for any number of threads that share a sample, of one tile of the grid or several.
template <class E, class T, bool vectors>
LTK_KERNEL(expert_backward_threads, (expert_blocks<T>(expert_backward_threads)))
expert_cross_entropy_backward_kernel(const ExpertCrossEntropyCall<T> call) {
  using C = Columns<E, T, vectors>;
  constexpr int count = C::count, part = C::part;
  const T inverse_count = read_inverse_denominator(call, call.inverse_count());
  const T known = inverse_count == inverse_count ? T(1) : T(NAN);  // whether the state is one of these kernels'
  const int a_row = call.threads_a_row, samples = expert_backward_threads / a_row;
  const int thread = simt::tile() * a_row + simt::thread() % a_row;
  const bool soft = call.diversity != T(0), distils = call.teacher != nullptr;
  for (int64_t i = simt::block() * samples + simt::thread() / a_row; i < call.rows; i += simt::blocks() * samples) {
    const ExpertRows<E> rows(call.input, call.input_layout, i), out(call.gradient, call.gradient_layout, i);
    const C columns(out.row(0), call.classes, thread, a_row * simt::tiles());
    const Label label = check_range(call, raw_label(call, i));
    if (label.ignored) {
      const T zeros[count] = {};
      for (auto group = columns.begin; group < columns.end; group += columns.step)
        for (int64_t e = 0; e < call.experts; ++e) columns.store(out.row(e), out.stride_class, group, zeros);
      continue;
    }
    const int64_t y = label.error != 0 ? 0 : label.y;  // a wrong label's state is NaN
    const T upstream = call.upstream[call.upstream_layout.offset(i)] * known;
    const SampleState<T> sample = *call.of_sample(i);
    const T kl = soft ? diversity_of(call, i) * inverse_count * upstream : T(0);
    const T of_mean = -kl * sample.mean_inverse;
    const T kd = call.distillation * inverse_count * row_weight_of(call, i) * upstream * call.distillation_scale /
                 T(call.experts);
    const T of_student = kd * sample.student_inverse, of_teacher = kd * sample.teacher_inverse;
    const auto factors_of = [&](int64_t e) { return ExpertFactors<T>(call, i, e, y, upstream, kl); };
    ExpertFactors<T> factors[experts_at_once];
    const int64_t number = call.experts < experts_at_once ? call.experts : experts_at_once;
#pragma unroll
    for (int e = 0; e < experts_at_once; ++e)
      if (e < number) factors[e] = factors_of(e);
    for (auto group = columns.begin; group < columns.end; group += columns.step) {
      const HeldExperts<E, C> some(rows, columns, 0, number, group);
      T common[count];
      if (soft || distils) {  // before a gradient replaces logits
#pragma unroll
        for (int from = 0; from < count; from += part) {
          T t[part], mean[part], q[part];
          read_temperature(call, columns, group, from, t);
          mean_of(rows, columns, some, 0, number, call.experts, group, from, mean);
          if (distils) read_teacher(call, columns, i, group, from, q);
#pragma unroll
          for (int k = 0; k < part; ++k) {
            T& value = common[from + k] = T(0);
            if (soft) value = of_mean * t[k] * exponential(t[k] * mean[k] - sample.mean_max);
            if (distils)
              value += of_student * exponential(call.distillation_scale * mean[k] - sample.student_max) -
                       of_teacher * exponential(call.distillation_scale * q[k] - sample.teacher_max);
          }
        }
      }
      const auto write = [&](int64_t e, const typename C::Held& held, const ExpertFactors<T>& f) {
        T d[count];
#pragma unroll
        for (int from = 0; from < count; from += part) {
          T t[part], z[part], u[part], a[part];
          read_temperature(call, columns, group, from, t);
          columns.decode(held, from, z);
          adjust(call, columns, e, group, from, z, u);
          if (call.scale != nullptr) columns.read(call.scale + e * call.classes, group, from, T(1), a);
#pragma unroll
          for (int k = 0; k < part; ++k) {
            const bool own = columns.column(group, from + k) == y;
            T& value = d[from + k] = own ? f.at_label : f.of_u * exponential(u[k] - f.max);
            if (call.scale != nullptr) value *= a[k];
            if (soft) value += f.of_soft * t[k] * exponential(t[k] * z[k] - f.soft_max);
            if (soft || distils) value += common[from + k];
          }
        }
        columns.store(out.row(e), out.stride_class, group, d);
      };
#pragma unroll
      for (int e = 0; e < experts_at_once; ++e)
        if (e < number) write(e, some.held[e], factors[e]);
      for (int64_t e = number; e < call.experts; ++e)
        write(e, columns.load(rows.row(e), rows.stride_class, group), factors_of(e));
    }
  }
}

}  // namespace ltk::cuda
