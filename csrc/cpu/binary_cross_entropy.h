// What the torch-free CPU core of binary_cross_entropy is asked to do.
#pragma once

#include <cstdint>

#include "common/binary_terms.h"
#include "common/rows.h"

namespace ltk {

// One call. T is the type of the computation and of every parameter: double for double logits, else float.
template <class T>
struct BinaryCrossEntropyCall {
  int64_t rows = 0, classes = 0;
  const void* input = nullptr;
  ElementType input_type{};
  Layout input_layout;
  const void* target = nullptr;  // labels at unit stride, or floating targets
  ElementType target_type{};
  Layout target_layout;  // of floating targets
  int64_t ignore_index = 0, background_index = -1;

  const T* weight = nullptr;  // of the row's label
  const T* pos_weight = nullptr;
  const T* neg_weight = nullptr;
  const T* keep[2] = {nullptr, nullptr};  // in rows of foreground and of background
  bool drawn[2] = {false, false};         // whether one of these probabilities is neither 0 nor 1
  const T* row_weight = nullptr;
  BinaryOptions<T> options{};
  uint32_t step = 0;
  uint64_t seed = 0;

  T inverse_denominator = 1;
  T* loss = nullptr;            // [rows], or null
  T* sums = nullptr;            // [2, C]: added to, or null
  const T* upstream = nullptr;  // one value or one a row; null is 1
  int64_t upstream_stride = 0;
  void* gradient = nullptr;  // or null
  ElementType gradient_type{};
  Layout gradient_layout;
};

// Rows [begin, end): losses, sums and gradients, whichever have memory. Returns whether floating targets are all in
// [0, 1]; labels are checked before. A row's results do not depend on how rows are cut into ranges.
template <class T>
struct BinaryCrossEntropyKernels {
  bool (*run)(const BinaryCrossEntropyCall<T>&, int64_t begin, int64_t end);
};

// The kernels of one instruction set.
struct BinaryCrossEntropyTable {
  BinaryCrossEntropyKernels<float> single;
  BinaryCrossEntropyKernels<double> real;  // double precision
};

}  // namespace ltk
