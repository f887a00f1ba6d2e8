// What the torch-free CPU core of cross_entropy is asked to do.
#pragma once

#include <cstdint>

#include "common/row_loss.h"
#include "common/rows.h"

namespace ltk {

// One call. T is the type of the computation and of every parameter: double for double logits, else float.
// The parameters are multiplied by the scale s already: u_j = scale[j] x_j + bias[j], with the uniform scale s where
// `scale` is null.
template <class T>
struct CrossEntropyCall {
  int64_t rows = 0, classes = 0;
  const void* input = nullptr;
  ElementType input_type{};
  Layout input_layout;
  const void* target = nullptr;  // labels at unit stride, or probabilities
  ElementType target_type{};
  Layout target_layout;  // of probabilities
  int64_t ignore_index = 0;

  T uniform_scale = 1;            // s
  const T* scale = nullptr;       // s a_j
  const T* bias = nullptr;        // s b_j
  const T* margin = nullptr;      // m, one or C values, not multiplied by s
  int64_t margin_stride = 0;      // 0 for one margin, else 1
  const T* weight = nullptr;      // w
  const T* smooth = nullptr;      // ws: w on classes with a finite bias; null without label smoothing
  const T* row_weight = nullptr;  // r
  RowOptions<T> options{};

  T* state = nullptr;  // RowState[rows]
  void* gradient = nullptr;
  ElementType gradient_type{};
  Layout gradient_layout;
  T inverse_denominator = 1;

  T* loss = nullptr;            // forward: [rows]
  const T* upstream = nullptr;  // one value or one a row; in a forward null for 1
  int64_t upstream_stride = 0;
  T* scale_sums = nullptr;  // backward: [C] sums over the call's rows of dl/da_j and dl/db_j, or null
  T* bias_sums = nullptr;
};

// Forward and backward of rows [begin, end); the rows' results do not depend on how they are cut into ranges. The
// gradient of either may be written over the logits. A forward
// returns whether all probabilities are finite, not negative, and 0 where the bias is -inf; labels are checked before.
template <class T>
struct CrossEntropyKernels {
  bool (*forward)(const CrossEntropyCall<T>&, int64_t begin, int64_t end);
  void (*backward)(const CrossEntropyCall<T>&, int64_t begin, int64_t end);
};

// The kernels of one instruction set.
struct CrossEntropyTable {
  CrossEntropyKernels<float> single;
  CrossEntropyKernels<double> real;  // double precision
};

}  // namespace ltk
