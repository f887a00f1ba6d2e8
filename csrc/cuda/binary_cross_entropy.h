// What the GPU kernels of binary_cross_entropy are asked to do. Torch-free; the kernels behind it are in
// binary_cross_entropy.cuh, one .cu a type of logits.
#pragma once

#include "common/binary_terms.h"
#include "cuda/cross_entropy.h"

namespace ltk::cuda {

// One call: logits, target, weight, row_weight, reduction, loss, gradient, tickets and error word as of cross_entropy.
// The state is the sums of the columns, where they are wanted, and 1 / denominator. The rest of the base is not used.
template <class T>
struct BinaryCall : Call<T> {
  int64_t background_index;
  const T *pos_weight, *neg_weight;
  const T* keep[2];  // in rows of foreground and of background
  BinaryOptions<T> terms;
  const int64_t* draw_step;  // or null
  uint64_t seed;
  bool column_sums;

  // Forward: blocks [0, chunks * splits) go down the columns, `row_blocks` more along the rows.
  int64_t chunks, splits, row_blocks;
  int threads_a_row;
  T* column_partials;  // [splits, 2, classes]

  LTK_HOST_DEVICE_MEMBER T* inverse_denominator() const { return this->state + (column_sums ? 2 * this->classes : 0); }
};

// E: the logits' type. Fills the call's grid for the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* plan_binary(BinaryCall<T>* call);

// Start the kernel on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* binary_forward(const BinaryCall<T>& call, void* stream);
template <class E, class T>
const char* binary_backward(const BinaryCall<T>& call, void* stream);

}  // namespace ltk::cuda
