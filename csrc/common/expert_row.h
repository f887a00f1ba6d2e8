// What a forward keeps of several experts' logits, and the cross-entropy of one of them.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/masked_term.h"

namespace ltk {

// Of an expert's logits of a sample: with m the maximum of u over the classes other than the label, e^(u_j - m) times
// `factor` is a probability; p - 1 of the label, computed without that difference; maximum and 1 / sum of the softened
// logits.
template <class T>
struct ExpertState {
  T max, factor, at_label, soft_max, soft_inverse;
};

// And of a sample: maximum and 1 / sum of the mean as the experts' divergence softens it, of the mean as the teacher's
// does, and of the teacher.
template <class T>
struct SampleState {
  T mean_max, mean_inverse, student_max, student_inverse, teacher_max, teacher_inverse;
};

// `share` times the cross-entropy, and its part of the state. `others` is the sum of e^(u_j - state->max) over j != y,
// `own` is u_y. What has no share adds nothing and moves nothing: also where all u are -inf, as of an expert that knows
// no class, and the softmax would be 0 / 0. That is NaN for those that have a share.
template <class T>
LTK_HOST_DEVICE T finish_cross_entropy(T others, T own, T share, ExpertState<T>* state) {
  if (share == T(0) && others == T(0) && own == -T(INFINITY)) {
    state->factor = state->at_label = T(0);
    return T(0);
  }
  const T m = own > state->max ? own : state->max;
  const T rise = state->max == -T(INFINITY) ? T(0) : std::exp(state->max - m);
  others *= rise;
  const T at_label = std::exp(own - m), total = others + at_label;
  state->factor = rise / total;
  state->at_label = -others / total;
  return masked_term(share, at_label > others ? std::log1p(others / at_label) : m - own + std::log(total));
}

}  // namespace ltk
