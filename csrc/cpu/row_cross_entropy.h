// What the torch-free CPU core is asked to do for losses whose adjustments depend on the row.
#pragma once

#include "common/row_adjustments.h"
#include "cpu/cross_entropy.h"

namespace ltk {

// One call: what all rows share is prepared as for cross_entropy, with labels. `scale` and `bias` are multiplied by s.
template <class T>
struct RowCrossEntropyCall : CrossEntropyCall<T> {
  const void* second_target = nullptr;  // labels of the same type at unit stride, or null
  const T* lam = nullptr;               // share of the first label, one value or one a row
  int64_t lam_stride = 0;
  MarginType margin_type{};
  const T* class_smoothing = nullptr;  // eps of each class, else options.label_smoothing
  bool off_target = false;
  T reached = 0;                    // K: classes that smoothing reaches
  const T* gate = nullptr;          // g
  const T* feature_norm = nullptr;  // of influence
  T influence_alpha = 1, influence_eps = 1;
  PairTerm pair_term{};
  const T* pair = nullptr;  // [C, C], log n [C] or 1 for rare classes [C]
  T pair_p = 0, pair_q = 0, log_pair_eps = 0;
  uint64_t drop_threshold = 0, seed = 0;
  uint32_t step = 0;

  // The state: see RowStates. `state` is not used.
  RowState<T>* states[2] = {nullptr, nullptr};
  T* log_sum = nullptr;
  T* gate_slopes[2] = {nullptr, nullptr};
  T inverse_denominators[2] = {1, 1};
  T* losses[2] = {nullptr, nullptr};  // forward: [rows] of each label
};

// Forward and backward of rows [begin, end); the rows' results do not depend on how they are cut into ranges.
template <class T>
struct RowCrossEntropyKernels {
  void (*forward)(const RowCrossEntropyCall<T>&, int64_t begin, int64_t end);
  void (*backward)(const RowCrossEntropyCall<T>&, int64_t begin, int64_t end);
};

struct RowCrossEntropyTable {
  RowCrossEntropyKernels<float> single;
  RowCrossEntropyKernels<double> real;  // double precision
};

}  // namespace ltk
