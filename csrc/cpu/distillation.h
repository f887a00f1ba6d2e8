// What the torch-free CPU core of distillation is asked to do.
#pragma once

#include <cstdint>

#include "common/distillation_row.h"
#include "common/rows.h"

namespace ltk {

// One call. T is the type of the computation and of every parameter: double for a double student, else float. Either
// all biases are given or none.
template <class T>
struct DistillationCall {
  int64_t rows = 0, classes = 0;
  const void* input = nullptr;
  ElementType input_type{};
  Layout input_layout;
  const void* teacher = nullptr;
  ElementType teacher_type{};
  Layout teacher_layout;
  const void* target = nullptr;  // labels at unit stride; null for no cross-entropy
  ElementType target_type{};
  int64_t ignore_index = 0;
  T student_scale = 1, teacher_scale = 1;                                           // inverse temperatures
  const T *student_bias = nullptr, *teacher_bias = nullptr, *class_bias = nullptr;  // the last: the label's
  const T* row_weight = nullptr;
  T kd_factor = 1, ce_factor = 1;  // the parts' weights over their denominators

  DistillationRow<T>* states = nullptr;
  void* gradient = nullptr;
  ElementType gradient_type{};
  Layout gradient_layout;
  T* loss = nullptr;            // forward: [rows]
  const T* upstream = nullptr;  // backward: one value or one a row
  int64_t upstream_stride = 0;
};

// Forward and backward of rows [begin, end); the rows' results do not depend on how they are cut into ranges.
template <class T>
struct DistillationKernels {
  void (*forward)(const DistillationCall<T>&, int64_t begin, int64_t end);
  void (*backward)(const DistillationCall<T>&, int64_t begin, int64_t end);
};

struct DistillationTable {
  DistillationKernels<float> single;
  DistillationKernels<double> real;  // double precision
};

}  // namespace ltk
