// Adjustments of a logit that depend on its row: margins on the angle, terms of the pair of label and class, smoothing
// and influence of the row. Torch-free and callable on host and device; ltkernels/reference/row_cross_entropy.py
// defines them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/philox.h"
#include "common/row_loss.h"

namespace ltk {

enum class MarginType : int { additive, arc, arc_straight_through };  // ltkernels/ops/options.py
enum class PairTerm : int { none, table, seesaw, drop };

// cos(acos(c) + m) of the label's cosine, and its derivative.
template <class T>
struct ArcCosine {
  T value, slope;
};

// Of an angle in [0, pi]. CUDA's cos keeps an array on the stack for angles of any size, cospi does not.
LTK_HOST_DEVICE void cos_and_sin(float m, float* cos_m, float* sin_m) {
#if defined(__CUDA_ARCH__)
  sincospif(m * 0.318309886183790672f, sin_m, cos_m);
#else
  *cos_m = std::cos(m);
  *sin_m = std::sin(m);
#endif
}
LTK_HOST_DEVICE void cos_and_sin(double m, double* cos_m, double* sin_m) {
#if defined(__CUDA_ARCH__)
  sincospi(m * 0.318309886183790672, sin_m, cos_m);
#else
  *cos_m = std::cos(m);
  *sin_m = std::sin(m);
#endif
}

template <class T>
LTK_HOST_DEVICE ArcCosine<T> arc_cosine(T c, T m, MarginType type) {
  T cos_m, sin_m;
  cos_and_sin(m, &cos_m, &sin_m);
  const T squared = T(1) - c * c;
  const bool flat = !(squared >= T(1e-12));  // there the angle has no slope; NaN stays NaN by c
  const T sine = std::sqrt(flat ? T(1e-12) : squared);
  const T moved = c * cos_m - sine * sin_m;
  if (type == MarginType::arc_straight_through) return {moved, T(1)};
  if (!(c > -cos_m)) return {c - m * sin_m, T(1)};  // past pi the cosine would rise again
  return {moved, flat ? cos_m : cos_m + c / sine * sin_m};
}

// Seesaw's term of class j in a row with label y, j != y; log_p is of the softmax of the logits without it.
template <class T>
struct Seesaw {
  T p, q, log_count_at_label, least;  // least = max(log p_y, log eps)
  LTK_HOST_DEVICE_MEMBER T operator()(T log_count, T log_p) const {
    const T rarer = log_count - log_count_at_label, above = log_p - least;
    return (rarer < T(0) ? p * rarer : T(0)) + (above > T(0) ? q * above : T(0));
  }
};

// The options of a row whose label has smoothing eps. q_y = 1 - eps off the target is (1 - e) + e / K for
// e = eps K / (K - 1), which may exceed 1.
template <class T>
LTK_HOST_DEVICE RowOptions<T> row_options(RowOptions<T> options, T eps, T reached, bool off_target) {
  if (off_target) eps = reached > T(1) ? eps * reached / (reached - T(1)) : T(0);
  options.label_smoothing = eps;
  options.smoothing_per_class = eps / reached;
  return options;
}

// The blocks of random words that a row of classes takes: class j has word j % 4 of block row * blocks + j / 4.
LTK_HOST_DEVICE int64_t drop_blocks(int64_t classes) { return (classes + 3) / 4; }
LTK_HOST_DEVICE bool is_dropped(int64_t row, int64_t j, int64_t classes, uint32_t step, uint64_t seed,
                                uint64_t threshold) {
  const PhiloxBlock block = philox(uint64_t(row * drop_blocks(classes) + j / 4), step, class_drops, seed);
  const bool odd = j % 2 != 0;  // not words[j % 4]: what is indexed is no register
  const uint32_t low = odd ? block.words[1] : block.words[0], high = odd ? block.words[3] : block.words[2];
  return (j % 4 < 2 ? low : high) < threshold;
}

// Where a forward leaves what its backward needs, in one tensor: ltkernels/ops/row_cross_entropy.py, new_state.
template <class T>
struct RowStates {
  RowState<T>* of_label[2];
  T* log_sum;     // seesaw: log-sum-exp of the row without the pair terms
  T* of_gate[2];  // d loss / d gate of each label, without upstream and denominator
  T* inverse;     // two values of 1 / denominator
  LTK_HOST_DEVICE_MEMBER RowStates(T* memory, int64_t rows, bool two_labels, bool seesaw, bool gate) {
    of_label[0] = reinterpret_cast<RowState<T>*>(memory);
    of_label[1] = two_labels ? of_label[0] + rows : nullptr;
    memory += 4 * rows * (two_labels ? 2 : 1);
    log_sum = seesaw ? memory : nullptr;
    memory += seesaw ? rows : 0;
    of_gate[0] = gate ? memory : nullptr;
    of_gate[1] = gate && two_labels ? memory + rows : nullptr;
    inverse = memory + (gate ? rows * (two_labels ? 2 : 1) : 0);
  }
  static LTK_HOST_DEVICE_MEMBER int64_t count(int64_t rows, bool two_labels, bool seesaw, bool gate) {
    const int64_t labels = two_labels ? 2 : 1;
    return rows * (4 * labels + (seesaw ? 1 : 0) + (gate ? labels : 0)) + 2;
  }
};

}  // namespace ltk
