// The losses of several experts, compiled once per instruction set.
//
// A sample's E rows are swept while they are in L1/L2: (1) their mean, and the exponentials of the mean's softmaxes;
// (2) for each expert the maximum and one exponential a logit, summed and kept; where the softened logits of the
// divergence are the cross-entropy's but for the margin, as before RIDE's deferred weights, it serves both; (3) where
// the gradient is wanted now, from the kept exponentials. With a_j = t z_j and b_j = t zbar_j less their maxima,
//   dl/dz_j = s a_ej w (p_j - [j = y]) + lambda t_j softmax(t z)_j + common_j,
//   common_j = -lambda t_j softmax(t zbar)_j + kappa tau (softmax(tau zbar)_j - q_j) / E,
// whose last line is the same for all experts. The label's column is apart: its logit has the margin, and p - 1 comes
// from the sum over the other classes.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/distillation_row.h"
#include "common/masked_term.h"
#include "cpu/expert_cross_entropy.h"
#include "cpu/expert_rows.h"

namespace ltk::LTK_ISA {
namespace {

template <class T>
using Call = ExpertCrossEntropyCall<T>;

// How the softened logits of the divergence are had: there is none, they are those of the cross-entropy, their own.
enum class Soft { none, shared, own };

// Scratch of a thread. Rows of one sample.
template <class T>
struct Workspace {
  Scratch<const T*> input;
  Scratch<T*> gradient;
  Scratch<T> share, mean, e_mean, common, e_soft, e_student, e_teacher, spare;

  explicit Workspace(const Call<T>& call)
      : input(call.experts),
        gradient(call.experts),
        share(call.experts),
        mean(call.classes),
        e_mean(call.classes),
        common(call.classes),
        e_soft(call.classes),
        e_student(call.teacher != nullptr ? call.classes : 0),
        e_teacher(call.teacher != nullptr ? call.classes : 0),
        spare(call.classes) {
    std::fill_n(share.data(), call.experts, T(1) / T(call.experts));
  }
};

template <class T>
struct ExpertTensors {
  bool long_rows;
  int64_t experts, tile;
  Rows<T> input, gradient, teacher;

  explicit ExpertTensors(const Call<T>& call)
      : long_rows(call.classes >= 256),
        experts(call.experts),
        tile(samples_a_tile(experts, call.classes,
                            call.input_layout.stride_class != 1 ||
                                (call.gradient != nullptr && call.gradient_layout.stride_class != 1))),
        input(call.input, call.input_type, call.input_layout, call.classes, tile * experts),
        gradient(call.gradient, call.input_type, call.gradient_layout, call.classes,
                 call.gradient != nullptr ? tile * experts : 0),
        teacher(call.teacher, call.teacher_type, call.teacher_layout, call.classes,
                call.teacher != nullptr ? tile : 0) {}

  // The memory of the expert's row of the sample after i, one of those before `end`.
  Ahead ahead(int64_t i, int64_t e, int64_t end) {
    if (!long_rows || i + 1 >= end) return {};
    const int64_t row = (i + 1) * experts + e;
    return {input.memory(row), gradient.memory(row), input.element_bytes(), gradient.element_bytes()};
  }
  // Calls one(sample, teacher) for each sample, its rows in work->input and work->gradient.
  template <class One>
  void for_samples(const Call<T>& call, int64_t begin, int64_t end, Workspace<T>* work, One one) {
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t last = std::min(first + tile, end);
      input.read(first * experts, last * experts);
      teacher.read(first, last);
      for (int64_t i = first; i < last; ++i) {
        for (int64_t e = 0; e < experts; ++e) {
          work->input.data()[e] = input.row(first * experts, i * experts + e);
          work->gradient.data()[e] =
              call.gradient != nullptr ? gradient.row(first * experts, i * experts + e) : work->spare.data();
        }
        one(i, call.teacher != nullptr ? teacher.row(first, i) : nullptr);
      }
      gradient.write(first * experts, last * experts);
    }
  }
};

template <class T>
struct Label {
  int64_t y;
  bool valid;
  Label(const Call<T>& call, int64_t sample)
      : y(label_at(call.target, call.target_type, sample)), valid(y != call.ignore_index) {}
};

template <class T, Affine form>
LTK_INLINE Adjusted<T, form> adjusted(const Call<T>& call, const T* z, int64_t e) {
  return {z, call.uniform_scale, form == Affine::full ? call.scale + e * call.classes : nullptr,
          form == Affine::uniform ? nullptr : call.bias + e * call.classes};
}

// The softened logits t z, which have factors of their own or are z itself.
template <class T, Soft soft>
struct Softened {
  const T *z, *t;
  template <class Load>
  LTK_INLINE Vec<T> minus(int64_t j, T shift, Load load) const {
    const Vec<T> v = load(z + j, -infinity<T>);
    return soft == Soft::own ? multiply_add<T>(v, load(t + j, T(1)), splat(-shift)) : v - shift;
  }
  T at(int64_t j) const { return soft == Soft::own ? z[j] * t[j] : z[j]; }
  T slope_at(int64_t j) const { return soft == Soft::own ? t[j] : T(1); }
};

// Calls part(begin, end) for the columns on either side of y.
template <class Part>
LTK_INLINE void beside(int64_t y, int64_t classes, Part part) {
  if (y > 0) part(int64_t(0), y);
  if (y + 1 < classes) part(y + 1, classes);
}

template <class T>
LTK_INLINE T weight_of(const Call<T>& call, int64_t sample) {
  return call.row_weight == nullptr ? T(1) : call.row_weight[sample];
}

// What multiplies expert e's cross-entropy of a sample with label y.
template <class T>
LTK_INLINE T share_of(const Call<T>& call, int64_t sample, int64_t e, int64_t y) {
  const T w = call.weight == nullptr ? T(1) : call.weight[e * call.classes + y];
  return weight_of(call, sample) * w * call.inverse_denominators[e];
}

template <class T, Affine form>
LTK_INLINE T own_logit(const Call<T>& call, const Adjusted<T, form> u, int64_t e, int64_t y) {
  const T margin = call.margin == nullptr ? T(0) : call.margin[e * call.classes + y];
  return u.at(y) - call.uniform_scale * margin;
}

// --- The mean, and what is common to the experts ---

// Writes e^(t zbar - maximum) of the experts' divergence.
template <class T, Soft soft>
void exponentiate_mean(const Softened<T, soft> b, int64_t classes, SampleState<T>* state, T* e_mean) {
  Vec<T> best = splat(-infinity<T>);
  sweep<T>(0, classes, [&](int64_t j, auto load, auto) { best = maximum<T>(best, b.minus(j, T(0), load)); });
  state->mean_max = max_lanes<T>(best);
  const Vec<T> zero = splat(T(0));
  Vec<T> sum = zero;
  blocks(classes, [&](int64_t begin, int64_t end) {
    Vec<T> part = zero;
    sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
      const Vec<T> e = exponential(b.minus(j, state->mean_max, load));
      store(e_mean + j, e);
      part += e;
    });
    sum += part;
  });
  state->mean_inverse = T(1) / sum_lanes<T>(sum);
}

// The divergence of the mean from the teacher, both softened; keeps their exponentials.
template <class T>
T distil(const Call<T>& call, const T* mean, const T* teacher, SampleState<T>* state, Workspace<T>* work) {
  const Adjusted<T, Affine::uniform> a{mean, call.distillation_scale, nullptr, nullptr},
      b{teacher, call.distillation_scale, nullptr, nullptr};
  const T a_max = state->student_max = row_maximum(a, call.classes);
  const T b_max = state->teacher_max = row_maximum(b, call.classes);
  T *e_student = work->e_student.data(), *e_teacher = work->e_teacher.data();
  const Vec<T> zero = splat(T(0));
  Vec<T> sum_a = zero, sum_b = zero, excess = zero, distance = zero;
  blocks(call.classes, [&](int64_t begin, int64_t end) {
    Vec<T> part_a = zero, part_b = zero, part_excess = zero, part_distance = zero;
    sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
      const Vec<T> va = a.minus(j, a_max, load), vb = b.minus(j, b_max, load);
      const Vec<T> ea = exponential(va), eb = exponential(vb);
      store(e_student + j, ea);
      store(e_teacher + j, eb);
      part_a += ea;
      part_b += eb;
      part_excess += ea - eb;
      part_distance += eb != zero ? eb * (vb - va) : zero;
    });
    sum_a += part_a;
    sum_b += part_b;
    excess += part_excess;
    distance += part_distance;
  });
  const DistillationSums<T> sums{sum_lanes<T>(sum_a), sum_lanes<T>(sum_b), sum_lanes<T>(excess),
                                 sum_lanes<T>(distance)};
  state->student_inverse = T(1) / sums.student;
  state->teacher_inverse = T(1) / sums.teacher;
  return divergence(sums);
}

// common_j, from exponentials of the mean (times its slope) and of the distillation's two sides.
template <class T, Soft soft, class Mean, class Student, class Teacher>
void write_common(const Call<T>& call, const Softened<T, soft> b, const SampleState<T>& state, T weight, Mean e_mean,
                  Student e_student, Teacher e_teacher, T* common) {
  const T of_mean = -call.diversity * call.inverse_count * weight * state.mean_inverse;
  const T kd = call.distillation * call.inverse_count * weight * call.distillation_scale / T(call.experts);
  const T of_student = kd * state.student_inverse, of_teacher = kd * state.teacher_inverse;
  const bool distils = call.teacher != nullptr;
  sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
    Vec<T> value = splat(T(0));
    if constexpr (soft != Soft::none) value = of_mean * e_mean(j, load);
    if constexpr (soft == Soft::own) value *= load(b.t + j, T(0));
    if (distils) value += multiply_add<T>(e_student(j, load), splat(of_student), -(e_teacher(j, load) * of_teacher));
    store(common + j, value);
  });
}

// --- One expert ---

// Sweep (2): fills the expert's state; returns its share of the cross-entropy and its divergence from the mean.
template <class T>
struct ExpertLoss {
  T cross_entropy, divergence;
};

template <class T, Affine form, Soft soft>
ExpertLoss<T> expert_forward(const Call<T>& call, const Adjusted<T, form> u, const Softened<T, soft> a,
                             const Softened<T, soft> b, const SampleState<T>& sample, int64_t e, int64_t y, T share,
                             const T* e_mean, const Ahead& next, T* out, T* e_soft, ExpertState<T>* state) {
  const Ahead ahead = next;
  const bool fetches = ahead.input != nullptr;
  const int64_t classes = call.classes;
  const Vec<T> zero = splat(T(0));
  state->max = -infinity<T>;
  beside(y, classes, [&](int64_t begin, int64_t end) {
    const Adjusted<T, form> part{u.x + begin, u.s, u.scale == nullptr ? nullptr : u.scale + begin,
                                 u.bias == nullptr ? nullptr : u.bias + begin};
    state->max = std::max(state->max, row_maximum(part, end - begin));
  });
  const T m = state->max == -infinity<T> ? T(0) : state->max;  // e^(-inf - 0) is 0
  const T b_max = sample.mean_max;
  T soft_max = T(0), rise = T(0);
  if constexpr (soft == Soft::shared) {
    soft_max = state->soft_max = std::max(state->max, a.at(y));
    rise = std::exp(state->max - soft_max);
  }
  Vec<T> sum = zero, excess = zero, distance = zero;
  beside(y, classes, [&](int64_t first, int64_t last) {
    blocks(last - first, [&](int64_t begin, int64_t end) {
      Vec<T> part = zero, part_excess = zero, part_distance = zero;
      sweep<T>(first + begin, first + end, [&](int64_t j, auto load, auto store) {
        if (fetches) ahead.column(j);
        const Vec<T> ex = exponential(u.minus(j, m, load));
        store(out + j, ex);
        part += ex;
        if constexpr (soft == Soft::shared) {
          const Vec<T> eb = load(e_mean + j, T(0)), gap = b.minus(j, b_max, load) - a.minus(j, soft_max, load);
          part_excess += multiply_add<T>(ex, splat(rise), -eb);
          part_distance += eb != zero ? eb * gap : zero;
        }
      });
      sum += part;
      excess += part_excess;
      distance += part_distance;
    });
  });
  const T others = sum_lanes<T>(sum);
  ExpertLoss<T> loss{finish_cross_entropy(others, own_logit(call, u, e, y), share, state), T(0)};
  if constexpr (soft == Soft::none) return loss;
  DistillationSums<T> sums{T(0), T(1) / sample.mean_inverse, T(0), T(0)};
  if constexpr (soft == Soft::shared) {
    const T ea = std::exp(a.at(y) - soft_max), eb = e_mean[y];
    sums.student = others * rise + ea;
    sums.excess = sum_lanes<T>(excess) + (ea - eb);
    sums.distance = sum_lanes<T>(distance) + (eb == T(0) ? T(0) : eb * ((b.at(y) - b_max) - (a.at(y) - soft_max)));
  } else {
    Vec<T> best = splat(-infinity<T>);
    sweep<T>(0, classes, [&](int64_t j, auto load, auto) { best = maximum<T>(best, a.minus(j, T(0), load)); });
    const T a_max = state->soft_max = max_lanes<T>(best);
    Vec<T> student = zero;
    excess = distance = zero;
    blocks(classes, [&](int64_t begin, int64_t end) {
      Vec<T> part = zero, part_excess = zero, part_distance = zero;
      sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
        const Vec<T> va = a.minus(j, a_max, load), ea = exponential(va), eb = load(e_mean + j, T(0));
        store(e_soft + j, ea);
        part += ea;
        part_excess += ea - eb;
        part_distance += eb != zero ? eb * (b.minus(j, b_max, load) - va) : zero;
      });
      student += part;
      excess += part_excess;
      distance += part_distance;
    });
    sums.student = sum_lanes<T>(student);
    sums.excess = sum_lanes<T>(excess);
    sums.distance = sum_lanes<T>(distance);
  }
  state->soft_inverse = T(1) / sums.student;
  loss.divergence = divergence(sums);
  return loss;
}

// Sweep (3), or the one of a backward: e_u(j, load) and e_soft(j, load) give e^(u_j - m) and e^(t_j z_j - maximum).
template <class T, Affine form, Soft soft, class ExpU, class ExpSoft>
void expert_gradient(const Call<T>& call, const Adjusted<T, form> u, const Softened<T, soft> a, int64_t sample,
                     int64_t e, int64_t y, const ExpertState<T> state, const T* common, T upstream, ExpU e_u,
                     ExpSoft e_soft, T* out) {
  const T share = share_of(call, sample, e, y);
  const T uniform = form == Affine::full ? T(1) : u.s;
  T of_u = uniform * share * state.factor;
  const T kl = call.diversity * call.inverse_count * weight_of(call, sample) * state.soft_inverse;
  const T soft_at_label = soft == Soft::none ? T(0) : kl * std::exp(a.at(y) - state.soft_max) * a.slope_at(y);
  // What carries no weight moves nothing, even where its loss is infinite.
  const T at_label = u.slope(y) * (share == T(0) ? T(0) : share * state.at_label) + soft_at_label +
                     (common == nullptr ? T(0) : common[y]);
  if (share == T(0)) of_u = T(0);
  if constexpr (soft == Soft::shared) of_u += kl * std::exp(state.max - state.soft_max);
  const auto write = [&](auto with_common) {
    sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
      Vec<T> d = of_u * e_u(j, load);
      if constexpr (form == Affine::full) d *= load(u.scale + j, T(0));
      if constexpr (soft == Soft::own) d = multiply_add<T>(kl * e_soft(j, load), load(a.t + j, T(0)), d);
      if constexpr (with_common) d += load(common + j, T(0));
      store(out + j, d * upstream);
    });
  };
  if (common != nullptr)
    write(std::true_type{});
  else
    write(std::false_type{});
  out[y] = at_label * upstream;
}

// --- All experts of a sample ---

template <class T, Affine form, Soft soft>
void forward(const Call<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  ExpertTensors<T> tensors(call);
  Workspace<T> work(call);
  const bool distils = call.teacher != nullptr;
  const auto kept = [](const T* from) { return [from](int64_t j, auto load) { return load(from + j, T(0)); }; };
  tensors.for_samples(call, begin, end, &work, [&](int64_t i, const T* teacher) {
    const T* const* z = work.input.data();
    const Label<T> label(call, i);
    T* mean = call.mean != nullptr ? call.mean + i * call.classes : work.mean.data();
    if (call.mean != nullptr || ((soft != Soft::none || distils) && label.valid))
      combine_rows(z, work.share.data(), static_cast<const T*>(nullptr), call.experts, call.classes, T(0), mean);
    ExpertState<T>* states = call.of_experts(i);
    SampleState<T>& sample = *call.of_sample(i);
    sample = {};
    call.loss[i] = T(0);
    if (!label.valid) {
      for (int64_t e = 0; e < call.experts; ++e) {
        states[e] = {};
        if (call.gradient != nullptr) std::fill_n(work.gradient.data()[e], call.classes, T(0));
      }
      return;
    }
    const T weight = weight_of(call, i);
    const Softened<T, soft> b{mean, call.temperature};
    T* e_mean = work.e_mean.data();
    if constexpr (soft != Soft::none) exponentiate_mean(b, call.classes, &sample, e_mean);
    T loss = T(0);
    if (distils)
      loss += masked_term(call.distillation * call.inverse_count * weight, distil(call, mean, teacher, &sample, &work));
    const T* common = nullptr;
    if (call.gradient != nullptr && (soft != Soft::none || distils)) {
      common = work.common.data();
      write_common(call, b, sample, weight, kept(e_mean), kept(work.e_student.data()), kept(work.e_teacher.data()),
                   work.common.data());
    }
    for (int64_t e = 0; e < call.experts; ++e) {
      const Adjusted<T, form> u = adjusted<T, form>(call, z[e], e);
      const Softened<T, soft> a{z[e], call.temperature};
      T *out = work.gradient.data()[e], *e_soft = work.e_soft.data();
      states[e] = {};
      const ExpertLoss<T> of_expert = expert_forward(call, u, a, b, sample, e, label.y, share_of(call, i, e, label.y),
                                                     e_mean, tensors.ahead(i, e, end), out, e_soft, &states[e]);
      loss += of_expert.cross_entropy;
      if constexpr (soft != Soft::none) {
        const T kl = call.diversity * call.inverse_count * weight;
        loss += kl < T(0) ? -masked_term(-kl, of_expert.divergence) : masked_term(kl, of_expert.divergence);
      }
      if (call.gradient != nullptr)
        expert_gradient(call, u, a, i, e, label.y, states[e], common, T(1), kept(out), kept(e_soft), out);
    }
    call.loss[i] = loss;
  });
}

template <class T, Affine form, Soft soft>
void backward(const Call<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  ExpertTensors<T> tensors(call);
  Workspace<T> work(call);
  const bool distils = call.teacher != nullptr;
  tensors.for_samples(call, begin, end, &work, [&](int64_t i, const T* teacher) {
    const T* const* z = work.input.data();
    const Label<T> label(call, i);
    if (!label.valid) {
      for (int64_t e = 0; e < call.experts; ++e) std::fill_n(work.gradient.data()[e], call.classes, T(0));
      return;
    }
    const T upstream = call.upstream[i * call.upstream_stride];
    const SampleState<T>& sample = *call.of_sample(i);
    const T* common = nullptr;
    if (soft != Soft::none || distils) {  // before a gradient replaces logits
      T* mean = work.mean.data();
      combine_rows(z, work.share.data(), static_cast<const T*>(nullptr), call.experts, call.classes, T(0), mean);
      const Softened<T, soft> b{mean, call.temperature};
      const auto softened = [&](const T* from, T shift) {
        const Adjusted<T, Affine::uniform> v{from, call.distillation_scale, nullptr, nullptr};
        return [v, shift](int64_t j, auto load) { return exponential(v.minus(j, shift, load)); };
      };
      common = work.common.data();
      write_common(
          call, b, sample, weight_of(call, i),
          [&](int64_t j, auto load) { return exponential(b.minus(j, sample.mean_max, load)); },
          softened(mean, sample.student_max), softened(teacher, sample.teacher_max), work.common.data());
    }
    for (int64_t e = 0; e < call.experts; ++e) {
      const Adjusted<T, form> u = adjusted<T, form>(call, z[e], e);
      const Softened<T, soft> a{z[e], call.temperature};
      const ExpertState<T> state = call.of_experts(i)[e];
      const T m = state.max == -infinity<T> ? T(0) : state.max;
      expert_gradient(
          call, u, a, i, e, label.y, state, common, upstream,
          [&](int64_t j, auto load) { return exponential(u.minus(j, m, load)); },
          [&](int64_t j, auto load) { return exponential(a.minus(j, state.soft_max, load)); }, work.gradient.data()[e]);
    }
  });
}

// Calls run(form, soft) with the call's forms as types.
template <class T, class Run>
void with_forms(const Call<T>& call, Run run) {
  const auto with_soft = [&](auto form) {
    if (call.diversity == T(0)) return run(form, std::integral_constant<Soft, Soft::none>{});
    if (form == Affine::uniform && call.temperature == nullptr)
      return run(form, std::integral_constant<Soft, form == Affine::uniform ? Soft::shared : Soft::own>{});
    return run(form, std::integral_constant<Soft, Soft::own>{});
  };
  if (call.scale != nullptr) return with_soft(std::integral_constant<Affine, Affine::full>{});
  if (call.bias != nullptr) return with_soft(std::integral_constant<Affine, Affine::bias>{});
  return with_soft(std::integral_constant<Affine, Affine::uniform>{});
}

template <class T>
void forward_any(const Call<T>& call, int64_t begin, int64_t end) {
  with_forms(call, [&](auto form, auto soft) { forward<T, form(), soft()>(call, begin, end); });
}

template <class T>
void backward_any(const Call<T>& call, int64_t begin, int64_t end) {
  with_forms(call, [&](auto form, auto soft) { backward<T, form(), soft()>(call, begin, end); });
}

}  // namespace

extern const ExpertCrossEntropyTable expert_cross_entropy_table;
const ExpertCrossEntropyTable expert_cross_entropy_table = {{forward_any<float>, backward_any<float>},
                                                            {forward_any<double>, backward_any<double>}};

}  // namespace ltk::LTK_ISA
