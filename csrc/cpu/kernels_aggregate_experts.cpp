// The weighted mean of several experts, compiled once per instruction set.
//
// A sample's E rows are swept while they are in L1/L2. With f_e the logits, probabilities or log-probabilities and
// share_e the weights over their sum, out = sum_e share_e f_e and, for an upstream gradient g,
//   logits      dl/dz_e = share_e g
//   probs       dl/dz_e = p_e (share_e g - sum_j share_e g p_e)
//   log_probs   dl/dz_e = share_e g - p_e sum_j share_e g
//   weights     dl/dw_e = sum g (f_e - out) / sum_e w_e      over what the weight is shared by.
// Probabilities need one exponential a logit, in the forward kept in scratch rows between their sum and their use.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/aggregate_experts.h"
#include "cpu/expert_rows.h"

namespace ltk::LTK_ISA {
namespace {

template <class T>
using Call = AggregateCall<T>;

// The rows of a call, read and written some samples at a time, and a sample's scratch rows.
template <class T>
struct AggregateTensors {
  int64_t experts, tile;
  Rows<T> input, output, gradient;
  Scratch<T> exponentials, mean;
  Scratch<const T*> z;

  explicit AggregateTensors(const Call<T>& call)
      : experts(call.experts),
        tile(samples_a_tile(experts, call.classes,
                            call.input_layout.stride_class != 1 || call.output_layout.stride_class != 1)),
        input(call.input, call.input_type, call.input_layout, call.classes, tile * experts),
        output(call.output, call.input_type, call.output_layout, call.classes, tile),
        gradient(call.gradient, call.input_type, call.gradient_layout, call.classes,
                 call.gradient != nullptr ? tile * experts : 0),
        exponentials(call.mode == AggregateMode::logits ? 0 : experts * call.classes),
        mean(call.classes),
        z(experts) {}

  template <class Tile>
  void for_tiles(int64_t begin, int64_t end, Tile one_tile) {
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t last = std::min(first + tile, end);
      input.read(first * experts, last * experts);
      one_tile(first, last);
    }
  }
  const T* const* rows(int64_t first, int64_t i) {
    for (int64_t e = 0; e < experts; ++e) z.data()[e] = input.row(first * experts, i * experts + e);
    return z.data();
  }
};

// The share of expert e in a sample's columns: one number, or a row of them.
template <class T, bool by_class>
struct Share {
  T uniform;
  const T* row;
  template <class Load>
  LTK_INLINE Vec<T> at(int64_t j, Load load) const {
    if constexpr (by_class) return load(row + j, T(0));
    return splat(uniform);
  }
  bool nothing() const { return !by_class && uniform == T(0); }
};

template <class T, bool by_class>
LTK_INLINE Share<T, by_class> share_of(const Call<T>& call, int64_t sample, int64_t e) {
  if constexpr (by_class) return {T(0), call.share + e * call.classes};
  if (call.weights == ExpertWeights::equal) return {T(1) / T(call.experts), nullptr};
  return {call.share[call.weights == ExpertWeights::sample ? sample * call.experts + e : e], nullptr};
}

// Maximum and 1 / sum of an expert's softmax; keeps e^(z - maximum).
template <class T>
LTK_INLINE void softmax_row(const T* z, int64_t classes, T* max, T* inverse_sum, T* e) {
  const Adjusted<T, Affine::uniform> u{z, T(1), nullptr, nullptr};
  *max = row_maximum(u, classes);
  *inverse_sum = T(1) / exponentiate(u, classes, *max, static_cast<const T*>(nullptr), e, Ahead{}).exponentials;
}

template <class T>
LTK_INLINE Vec<T> finite_or_zero(Vec<T> share, Vec<T> value) {
  const Vec<T> zero = splat(T(0));
  return (share == zero) & ((value - value) != zero) ? zero : value;  // inf - inf and NaN are not 0
}

// f_e at the columns from j; `e` gives e^(z_j - maximum) where the mode needs it.
template <AggregateMode mode, class T, class Load, class Exponential>
LTK_INLINE Vec<T> value_of(const T* z, const T* softmax, T log_sum, int64_t j, Load load, Exponential e) {
  if constexpr (mode == AggregateMode::probs) return e(j, load) * softmax[1];
  const Vec<T> v = load(z + j, T(0));
  return mode == AggregateMode::log_probs ? v - log_sum : v;
}

template <class T>
T log_sum_of(const T* softmax) {
  return softmax[0] - std::log(softmax[1]);
}

// The mean of a sample into `out`.
template <AggregateMode mode, bool by_class, class T>
void mean_row(const Call<T>& call, int64_t i, const T* const* z, const T* exponentials, T* out) {
  bool first = true;
  for (int64_t e = 0; e < call.experts; ++e) {
    const Share<T, by_class> share = share_of<T, by_class>(call, i, e);
    if (share.nothing() && !(first && e + 1 == call.experts)) continue;
    const T* softmax = mode == AggregateMode::logits ? nullptr : call.softmax + 2 * (i * call.experts + e);
    const T log_sum = mode == AggregateMode::log_probs ? log_sum_of(softmax) : T(0);
    const T* kept = exponentials + e * call.classes;
    const auto add = [&](auto onto) {
      sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
        const auto e_z = [kept](int64_t at, auto load_at) { return load_at(kept + at, T(0)); };
        const Vec<T> s = share.at(j, load);
        Vec<T> f = value_of<mode>(z[e], softmax, log_sum, j, load, e_z);
        if constexpr (by_class) f = finite_or_zero<T>(s, f);
        store(out + j, onto(j, load, s, f));
      });
    };
    if (first)
      add([](int64_t, auto, Vec<T> s, Vec<T> f) { return s * f; });
    else
      add([out](int64_t j, auto load, Vec<T> s, Vec<T> f) { return multiply_add<T>(s, f, load(out + j, T(0))); });
    first = false;
  }
}

// Whether a is a better score than b: NaN before all, as torch sorts.
template <class T>
LTK_INLINE bool better(T a, T b) {
  return a > b || (a != a && b == b);
}

// The best classes of a row in order, of equal ones the first.
template <class T, class I>
void best_classes(const T* row, int64_t classes, int64_t topk, I* best) {
  int64_t found = 0;
  for (int64_t j = 0; j < classes; ++j) {
    if (found == topk && !better(row[j], row[best[found - 1]])) continue;
    int64_t at = found < topk ? found++ : topk - 1;
    for (; at > 0 && better(row[j], row[best[at - 1]]); --at) best[at] = best[at - 1];
    best[at] = I(j);
  }
}

template <AggregateMode mode, class T>
void best_of(const Call<T>& call, int64_t i, const T* row, T* spare) {
  using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  I* best = static_cast<I*>(call.best) + i * call.topk;
  T* confidence = call.confidence + i * call.topk;
  best_classes(row, call.classes, call.topk, best);
  T max = T(0), inverse_sum = T(1);
  if (mode != AggregateMode::probs) softmax_row(row, call.classes, &max, &inverse_sum, spare);
  for (int64_t k = 0; k < call.topk; ++k)
    confidence[k] = mode == AggregateMode::probs ? row[best[k]] : std::exp(row[best[k]] - max) * inverse_sum;
}

template <AggregateMode mode, bool by_class, class T>
void forward(const Call<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  AggregateTensors<T> tensors(call);
  tensors.for_tiles(begin, end, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* const* z = tensors.rows(first, i);
      T* e = tensors.exponentials.data();
      if constexpr (mode != AggregateMode::logits)
        for (int64_t k = 0; k < call.experts; ++k) {
          T* softmax = call.softmax + 2 * (i * call.experts + k);
          softmax_row(z[k], call.classes, softmax, softmax + 1, e + k * call.classes);
        }
      T* out = tensors.output.row(first, i);
      mean_row<mode, by_class>(call, i, z, e, out);
      if (call.topk > 0) best_of<mode>(call, i, out, tensors.mean.data());
    }
    tensors.output.write(first, last);
  });
}

template <AggregateMode mode, bool by_class, class T>
void expert_backward(const Call<T>& call, int64_t i, int64_t e, const T* z, const T* g, const T* mean, T* exponentials,
                     T* out) {
  const Share<T, by_class> share = share_of<T, by_class>(call, i, e);
  const T* softmax = mode == AggregateMode::logits ? nullptr : call.softmax + 2 * (i * call.experts + e);
  const T max = mode == AggregateMode::logits ? T(0) : softmax[0];
  const T log_sum = mode == AggregateMode::log_probs ? log_sum_of(softmax) : T(0);
  const Adjusted<T, Affine::uniform> u{z, T(1), nullptr, nullptr};
  const auto kept = [&](int64_t j, auto load) { return load(exponentials + j, T(0)); };
  const bool weights = call.share_sums != nullptr;
  const Vec<T> zero = splat(T(0));
  Vec<T> inner = zero, of_share = zero;
  if (mode != AggregateMode::logits || weights) {
    T* class_sums = by_class && weights ? call.share_sums + e * call.classes : nullptr;
    blocks(call.classes, [&](int64_t begin, int64_t end) {
      Vec<T> part = zero, part_share = zero;
      sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
        const Vec<T> gj = load(g + j, T(0)), s = share.at(j, load);
        if constexpr (mode != AggregateMode::logits) store(exponentials + j, exponential(u.minus(j, max, load)));
        const Vec<T> f = finite_or_zero<T>(s, value_of<mode>(z, softmax, log_sum, j, load, kept));
        part += mode == AggregateMode::probs ? s * gj * f : s * gj;
        if (weights) {
          const Vec<T> change = gj * (f - load(mean + j, T(0)));
          if constexpr (by_class)
            store(class_sums + j, load(class_sums + j, T(0)) + change);
          else
            part_share += change;
        }
      });
      inner += part;
      of_share += part_share;
    });
  }
  if (weights && !by_class)
    call.share_sums[call.weights == ExpertWeights::sample ? i * call.experts + e : e] += sum_lanes<T>(of_share);
  if (out == nullptr) return;
  if (share.nothing()) {
    std::fill_n(out, call.classes, T(0));
    return;
  }
  const T total = sum_lanes<T>(inner), inverse_sum = mode == AggregateMode::logits ? T(0) : softmax[1];
  sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
    const Vec<T> sg = share.at(j, load) * load(g + j, T(0));
    if constexpr (mode == AggregateMode::logits) {
      store(out + j, sg);
    } else {
      const Vec<T> p = load(exponentials + j, T(0)) * inverse_sum;
      store(out + j, mode == AggregateMode::probs ? p * (sg - total) : sg - p * total);
    }
  });
}

template <AggregateMode mode, bool by_class, class T>
void backward(const Call<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  AggregateTensors<T> tensors(call);
  tensors.for_tiles(begin, end, [&](int64_t first, int64_t last) {
    tensors.output.read(first, last);
    for (int64_t i = first; i < last; ++i) {
      const T* const* z = tensors.rows(first, i);
      const T* g = tensors.output.row(first, i);
      T *e = tensors.exponentials.data(), *mean = tensors.mean.data();
      if (call.share_sums != nullptr) {
        if constexpr (mode == AggregateMode::probs)
          for (int64_t k = 0; k < call.experts; ++k) {
            const Adjusted<T, Affine::uniform> u{z[k], T(1), nullptr, nullptr};
            const T max = call.softmax[2 * (i * call.experts + k)];
            exponentiate(u, call.classes, max, static_cast<const T*>(nullptr), e + k * call.classes, Ahead{});
          }
        mean_row<mode, by_class>(call, i, z, e, mean);
      }
      for (int64_t k = 0; k < call.experts; ++k)
        expert_backward<mode, by_class>(
            call, i, k, z[k], g, mean, e,
            call.gradient == nullptr ? nullptr : tensors.gradient.row(first * call.experts, i * call.experts + k));
    }
    tensors.gradient.write(first * call.experts, last * call.experts);
  });
}

// Calls run(mode, by_class) with the call's mode and kind of weights as types.
template <class T, class Run>
void with_mode(const Call<T>& call, Run run) {
  const auto with_weights = [&](auto mode) {
    if (call.weights == ExpertWeights::classes) return run(mode, std::true_type{});
    return run(mode, std::false_type{});
  };
  if (call.mode == AggregateMode::probs)
    return with_weights(std::integral_constant<AggregateMode, AggregateMode::probs>{});
  if (call.mode == AggregateMode::log_probs)
    return with_weights(std::integral_constant<AggregateMode, AggregateMode::log_probs>{});
  return with_weights(std::integral_constant<AggregateMode, AggregateMode::logits>{});
}

template <class T>
void forward_any(const Call<T>& call, int64_t begin, int64_t end) {
  with_mode(call, [&](auto mode, auto by_class) { forward<mode(), by_class()>(call, begin, end); });
}

template <class T>
void backward_any(const Call<T>& call, int64_t begin, int64_t end) {
  with_mode(call, [&](auto mode, auto by_class) { backward<mode(), by_class()>(call, begin, end); });
}

}  // namespace

extern const AggregateTable aggregate_experts_table;
const AggregateTable aggregate_experts_table = {{forward_any<float>, backward_any<float>},
                                                {forward_any<double>, backward_any<double>}};

}  // namespace ltk::LTK_ISA
