// What the torch-free CPU core of several experts' losses is asked to do.
#pragma once

#include <cstdint>

#include "common/expert_row.h"
#include "common/rows.h"

namespace ltk {

// One call. T is the type of the computation and of every parameter. Rows are those of samples: the experts of a sample
// one after the other.
template <class T>
struct ExpertCrossEntropyCall {
  int64_t experts = 0, samples = 0, classes = 0;
  const void* input = nullptr;
  ElementType input_type{};
  Layout input_layout;
  const void* teacher = nullptr;  // null for no distillation
  ElementType teacher_type{};
  Layout teacher_layout;
  const void* target = nullptr;
  ElementType target_type{};
  int64_t ignore_index = 0;
  T uniform_scale = 1;
  // [experts, classes], null for none; scale and bias come times the uniform scale, and with a scale there is a bias.
  const T *scale = nullptr, *bias = nullptr, *margin = nullptr, *weight = nullptr;
  const T* row_weight = nullptr;
  T diversity = 0;                 // its factor
  const T* temperature = nullptr;  // [classes], one over it; null where softened logits are u but for the margin
  T distillation = 0, distillation_scale = 1;

  T* states = nullptr;                      // a sample: ExpertState of each expert, SampleState
  T* mean = nullptr;                        // [samples, classes] of the mean logits, or null
  const T* inverse_denominators = nullptr;  // [experts]
  T inverse_count = 1;
  void* gradient = nullptr;
  Layout gradient_layout;
  T* loss = nullptr;            // forward: [samples]
  const T* upstream = nullptr;  // backward: one value or one a sample
  int64_t upstream_stride = 0;

  ExpertState<T>* of_experts(int64_t sample) const {
    return reinterpret_cast<ExpertState<T>*>(states + sample * (5 * experts + 6));
  }
  SampleState<T>* of_sample(int64_t sample) const {
    return reinterpret_cast<SampleState<T>*>(states + sample * (5 * experts + 6) + 5 * experts);
  }
};

// Forward and backward of samples [begin, end); results do not depend on how they are cut into ranges.
template <class T>
struct ExpertCrossEntropyKernels {
  void (*forward)(const ExpertCrossEntropyCall<T>&, int64_t begin, int64_t end);
  void (*backward)(const ExpertCrossEntropyCall<T>&, int64_t begin, int64_t end);
};

struct ExpertCrossEntropyTable {
  ExpertCrossEntropyKernels<float> single;
  ExpertCrossEntropyKernels<double> real;  // double precision
};

}  // namespace ltk
