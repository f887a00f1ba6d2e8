// What the sums over a row of student and teacher come to: the CPU and the GPU kernels finish their rows here.
//
// With a, b the softened logits of student and teacher less their maxima, A, B the sums of their exponentials,
//   KL = sum_j q_j (log q_j - log p_j) = (1 / B) sum_j e^(b_j) (b_j - a_j) + log(1 + (A - B) / B),
// where A - B is added up class by class: neither log A nor log B, nor A nor B, all far larger than a small divergence,
// is rounded by itself.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace ltk {

// What a forward keeps of a row for its backward: maximum and 1 / sum e^(u - maximum) of the student's and the
// teacher's softened logits and of the cross-entropy's, and there p - 1 at the label, computed without that difference.
// The cross-entropy's are 0 for a row without one. Seven numbers a row; behind the rows stand 1 / labels and 1 / rows.
template <class T>
struct DistillationRow {
  T max, inverse_sum;
  T teacher_max, teacher_inverse_sum;
  T ce_max, ce_inverse_sum, at_label;
};

template <class T>
struct DistillationSums {
  T student, teacher, excess, distance;  // A, B, A - B, sum_j e^(b_j) (b_j - a_j)
};

template <class T>
LTK_HOST_DEVICE T divergence(const DistillationSums<T>& sums) {
  const T excess = sums.excess / sums.teacher;
  const T log_ratio = excess > T(-0.5) && excess < T(1) ? std::log1p(excess) : std::log(sums.student / sums.teacher);
  const T kl = sums.distance / sums.teacher + log_ratio;
  return kl < T(0) ? T(0) : kl;  // by rounding
}

// The cross-entropy, and its part of the state. `others` is the sum of e^(u_j - m) over j != y, `at_label` e^(u_y - m),
// `label_distance` m - u_y.
template <class T>
LTK_HOST_DEVICE T finish_label(T others, T at_label, T label_distance, DistillationRow<T>* state) {
  const T total = others + at_label;
  state->ce_inverse_sum = T(1) / total;
  state->at_label = -others / total;
  return at_label > others ? std::log1p(others / at_label) : label_distance + std::log(total);
}

}  // namespace ltk
