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
  bool long_rows;
  int64_t experts, tile;
  Rows<T> input, output, gradient;
  Scratch<T> exponentials, mean;
  Scratch<const T*> z, combined;  // an expert's logits; what is combined of it
  Scratch<T> factors, shifts;

  explicit AggregateTensors(const Call<T>& call)
      : long_rows(call.classes >= 256),
        experts(call.experts),
        tile(samples_a_tile(experts, call.classes,
                            call.input_layout.stride_class != 1 || call.output_layout.stride_class != 1)),
        input(call.input, call.input_type, call.input_layout, call.classes, tile * experts),
        output(call.output, call.input_type, call.output_layout, call.classes, tile),
        gradient(call.gradient, call.input_type, call.gradient_layout, call.classes,
                 call.gradient != nullptr ? tile * experts : 0),
        exponentials(call.mode == AggregateMode::logits ? 0 : experts * call.classes),
        mean(call.classes),
        z(experts),
        combined(experts),
        factors(experts),
        shifts(experts) {}

  template <class Tile>
  void for_tiles(int64_t begin, int64_t end, Tile one_tile) {
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t last = std::min(first + tile, end);
      input.read(first * experts, last * experts);
      one_tile(first, last);
    }
  }
  // The memory of the expert's row of the sample after i, one of those before `end`.
  Ahead ahead(int64_t i, int64_t e, int64_t end) {
    if (!long_rows || i + 1 >= end) return {};
    const int64_t row = (i + 1) * experts + e;
    return {input.memory(row), gradient.memory(row), input.element_bytes(), gradient.element_bytes()};
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
LTK_INLINE void softmax_row(const T* z, int64_t classes, const Ahead& ahead, T* max, T* inverse_sum, T* e) {
  const Adjusted<T, Affine::uniform> u{z, T(1), nullptr, nullptr};
  *max = row_maximum(u, classes);
  *inverse_sum = T(1) / exponentiate(u, classes, *max, static_cast<const T*>(nullptr), e, ahead).exponentials;
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
  return mode == AggregateMode::log_probs ? (v - softmax[0]) - log_sum : v;
}

// log sum_j e^(z_j - maximum)
template <class T>
T log_sum_of(const T* softmax) {
  return -std::log(softmax[1]);
}

// The mean of a sample into `out`, from the kept exponentials where it is one of probabilities.
template <AggregateMode mode, bool by_class, class T>
void mean_row(const Call<T>& call, int64_t i, AggregateTensors<T>* tensors, T* out) {
  const T *const *z = tensors->z.data(), *exponentials = tensors->exponentials.data();
  const T* softmax = mode == AggregateMode::logits ? nullptr : call.softmax + 2 * i * call.experts;
  if constexpr (!by_class) {
    int64_t count = 0;
    T less = T(0);
    for (int64_t e = 0; e < call.experts; ++e) {
      const T share = share_of<T, false>(call, i, e).uniform;
      if (share == T(0)) continue;
      tensors->combined.data()[count] = mode == AggregateMode::probs ? exponentials + e * call.classes : z[e];
      if (mode == AggregateMode::log_probs) tensors->shifts.data()[count] = softmax[2 * e];
      tensors->factors.data()[count++] = mode == AggregateMode::probs ? share * softmax[2 * e + 1] : share;
      if (mode == AggregateMode::log_probs) less += share * log_sum_of(softmax + 2 * e);
    }
    const T* shifts = mode == AggregateMode::log_probs ? tensors->shifts.data() : nullptr;
    return combine_rows(tensors->combined.data(), tensors->factors.data(), shifts, count, call.classes, less, out);
  }
  for (int64_t e = 0; e < call.experts; ++e) {
    const T* share = call.share + e * call.classes;
    const T* kept = exponentials + e * call.classes;
    const T log_sum = mode == AggregateMode::log_probs ? log_sum_of(softmax + 2 * e) : T(0);
    sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
      const Vec<T> s = load(share + j, T(0)), before = e == 0 ? splat(T(0)) : load(out + j, T(0));
      const auto e_z = [kept](int64_t at, auto load_at) { return load_at(kept + at, T(0)); };
      const Vec<T> f = value_of<mode>(z[e], softmax + 2 * e, log_sum, j, load, e_z);
      store(out + j, multiply_add<T>(s, finite_or_zero<T>(s, f), before));
    });
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
  if (mode != AggregateMode::probs) softmax_row(row, call.classes, Ahead{}, &max, &inverse_sum, spare);
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
          softmax_row(z[k], call.classes, tensors.ahead(i, k, end), softmax, softmax + 1, e + k * call.classes);
        }
      T* out = tensors.output.row(first, i);
      mean_row<mode, by_class>(call, i, &tensors, out);
      if (call.topk > 0) best_of<mode>(call, i, out, tensors.mean.data());
    }
    tensors.output.write(first, last);
  });
}

// What the weights' gradients are sums of: g (f_e - out).
template <AggregateMode mode, bool by_class, class T>
void weight_backward(const Call<T>& call, int64_t i, int64_t e, const T* z, const T* g, const T* mean,
                     const T* exponentials) {
  const Share<T, by_class> share = share_of<T, by_class>(call, i, e);
  const T* softmax = mode == AggregateMode::logits ? nullptr : call.softmax + 2 * (i * call.experts + e);
  const T log_sum = mode == AggregateMode::log_probs ? log_sum_of(softmax) : T(0);
  const auto kept = [&](int64_t j, auto load) { return load(exponentials + j, T(0)); };
  T* sums = call.share_sums;
  Vec<T> total = splat(T(0));
  blocks(call.classes, [&](int64_t begin, int64_t end) {
    Vec<T> part = splat(T(0));
    sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
      const Vec<T> f = finite_or_zero<T>(share.at(j, load), value_of<mode>(z, softmax, log_sum, j, load, kept));
      const Vec<T> change = load(g + j, T(0)) * (f - load(mean + j, T(0)));
      if constexpr (by_class)
        store(sums + e * call.classes + j, load(sums + e * call.classes + j, T(0)) + change);
      else
        part += change;
    });
    total += part;
  });
  if constexpr (!by_class)
    sums[call.weights == ExpertWeights::sample ? i * call.experts + e : e] += sum_lanes<T>(total);
}

// The gradient of an expert's logits, where the exponentials stand first.
template <AggregateMode mode, bool by_class, class T>
void logits_backward(const Call<T>& call, int64_t i, int64_t e, const T* z, const T* g, const Ahead& ahead, T* out) {
  const Share<T, by_class> share = share_of<T, by_class>(call, i, e);
  if (share.nothing()) {
    std::fill_n(out, call.classes, T(0));
    return;
  }
  if constexpr (mode == AggregateMode::logits) {
    sweep<T>(0, call.classes,
             [&](int64_t j, auto load, auto store) { store(out + j, share.at(j, load) * load(g + j, T(0))); });
    return;
  }
  const T *softmax = call.softmax + 2 * (i * call.experts + e), max = softmax[0];
  const Adjusted<T, Affine::uniform> u{z, T(1), nullptr, nullptr};
  const Vec<T> zero = splat(T(0));
  Vec<T> sum = zero;
  const auto fetch = ahead;
  const bool fetches = ahead.input != nullptr;
  blocks(call.classes, [&](int64_t begin, int64_t end) {
    Vec<T> part = zero;
    sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
      if (fetches) fetch.column(j);
      const Vec<T> ez = exponential(u.minus(j, max, load));
      store(out + j, ez);
      Vec<T> sg = load(g + j, T(0));
      if constexpr (by_class) sg *= load(share.row + j, T(0));
      part = mode == AggregateMode::probs ? multiply_add<T>(sg, ez, part) : part + sg;
    });
    sum += part;
  });
  // With c the share of all columns: probs e (c g - total) / sum; log_probs c g - e total / sum.
  const T c = by_class ? T(1) : share.uniform, inverse_sum = softmax[1];
  const T total = c * sum_lanes<T>(sum) * (mode == AggregateMode::probs ? inverse_sum : T(1));
  const T of_g = mode == AggregateMode::probs ? c * inverse_sum : c, of_total = -total * inverse_sum;
  sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
    const Vec<T> ez = load(out + j, T(0));
    Vec<T> sg = load(g + j, T(0));
    if constexpr (by_class) sg *= load(share.row + j, T(0));
    if constexpr (mode == AggregateMode::probs)
      store(out + j, ez * multiply_add<T>(splat(of_g), sg, splat(of_total)));
    else
      store(out + j, multiply_add<T>(splat(of_total), ez, of_g * sg));
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
        mean_row<mode, by_class>(call, i, &tensors, mean);
        for (int64_t k = 0; k < call.experts; ++k)
          weight_backward<mode, by_class>(call, i, k, z[k], g, mean, e + k * call.classes);
      }
      for (int64_t k = 0; k < call.experts && call.gradient != nullptr; ++k)
        logits_backward<mode, by_class>(call, i, k, z[k], g, tensors.ahead(i, k, end),
                                        tensors.gradient.row(first * call.experts, i * call.experts + k));
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
