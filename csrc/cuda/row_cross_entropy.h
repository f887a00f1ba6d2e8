// What the GPU kernels of losses whose adjustments depend on the row are asked to do. Torch-free; the kernels behind it
// are in row_cross_entropy.cuh, one .cu a type of logits.
#pragma once

#include "common/row_adjustments.h"
#include "cuda/cross_entropy.h"

namespace ltk::cuda {

// One call, with labels; what it has in common with cross_entropy is there. Adjusted logits are
// s (A_j x_j + B_j) + pair - s m_y [j = y]. `options.label_smoothing` is 1 if any row may be smoothed, else 0: eps is
// the row's.
template <class T>
struct RowCall : Call<T> {
  const void* second_target;  // labels of the same type, or null
  Layout second_layout;
  const T* lam;  // share of the first label in each row, or null: `one_lam` for all
  T one_lam;
  MarginType margin_type;
  const T* class_smoothing;  // eps of each class, or null: `smoothing` for all
  T smoothing;
  bool off_target;
  const T* gate;          // g
  const T* feature_norm;  // of influence
  T influence_alpha, influence_eps;
  PairTerm pair_term;
  const T* pair;  // [C, C], log n [C] or 1 for rare classes [C]
  T pair_p, pair_q, log_pair_eps;
  uint64_t drop_threshold, seed;
  const int64_t* step;

  T* gate_gradient;  // backward: one a row, or null

  LTK_HOST_DEVICE_MEMBER bool has_two_labels() const { return second_target != nullptr; }
  LTK_HOST_DEVICE_MEMBER RowStates<T> states() const {
    return RowStates<T>(this->state, this->rows, has_two_labels(), pair_term == PairTerm::seesaw, gate != nullptr);
  }
};

// E: the logits' type. Memory that a forward needs for partial sums, in doubles, and the splits of the rows whose sums
// a backward has for each class. `error` is null, or what CUDA says is wrong.
template <class E, class T>
int64_t row_forward_partials(const RowCall<T>& call, const char** error);
template <class E, class T>
int64_t row_column_splits(const RowCall<T>& call, const char** error);

// Start the kernel on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* row_forward(const RowCall<T>& call, void* stream);
template <class E, class T>
const char* row_backward(const RowCall<T>& call, void* stream);

}  // namespace ltk::cuda
