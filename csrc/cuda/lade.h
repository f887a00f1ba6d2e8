// What the GPU kernels of LADE are asked to do. Torch-free; the kernels behind it are in lade.cuh, one .cu a type of
// logits.
#pragma once

#include "cuda/cross_entropy.h"

namespace ltk::cuda {

// How logits are read: one at a time, with 16-byte accesses along the rows, or with those down the columns too.
enum class LadeAccess : int { any, rows, aligned };

// How a forward is cut: blocks [0, chunks * splits) go down the columns, each with a chunk of the classes and a split
// of the rows, `row_blocks` more along the rows. A chunk's threads are `width` columns, of one vector each, times lanes
// that walk down the rows side by side.
struct LadeGrid {
  int64_t chunks, splits, row_blocks;
  int width;
  bool rows_first;  // neighbouring threads are neighbouring rows
  LadeAccess access;
  int threads_a_row;
};

// One call: logits, labels, biases, gradient, tickets (one, and one a chunk) and error word as of cross_entropy. The
// state is 3 numbers a row, 3 a class, 1 / N (ltkernels/ops/lade.py). The rest of the base is not used.
template <class T>
struct LadeCall : Call<T> {
  T remine_lambda, strength;  // of the regulariser; at 0 there is none
  bool with_ce;
  const T *prior, *class_offset, *row_offset;  // the last two may be null
  LadeGrid grid;
  T* column_partials;  // [splits, 4, classes]: maximum, sum, sum of the labels' logits, their number

  // `partials` of the base: two sums a row block, the regulariser of each chunk, the rows of each chunk and split.
  int64_t partial_sums() const { return 2 * grid.row_blocks + grid.chunks + grid.chunks * grid.splits; }
};

// E: the logits' type. Fills call->grid for the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* plan_lade(LadeCall<T>* call);

// Start the kernel on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* lade_forward(const LadeCall<T>& call, void* stream);
template <class E, class T>
const char* lade_backward(const LadeCall<T>& call, void* stream);

}  // namespace ltk::cuda
