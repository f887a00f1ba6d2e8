// What the torch-free CPU core of the experts' mean is asked to do.
#pragma once

#include <cstdint>

#include "common/expert_mean.h"
#include "common/rows.h"

namespace ltk {

// One call. T is the type of the computation and of the weights. Rows are those of samples: the experts of a sample one
// after the other.
template <class T>
struct AggregateCall {
  int64_t experts = 0, samples = 0, classes = 0, topk = 0;
  AggregateMode mode{};
  ExpertWeights weights{};
  const void* input = nullptr;
  ElementType input_type{};
  Layout input_layout;
  // The weights over their sums: [experts], [samples, experts] or [experts, classes]; null for equal ones.
  const T* share = nullptr;

  T* softmax = nullptr;     // [samples, experts]: maximum and 1 / sum; null for logits
  void* best = nullptr;     // [samples, topk], integers of T's size
  T* confidence = nullptr;  // [samples, topk]
  void* output = nullptr;   // forward: [samples, classes]; backward: its gradient
  Layout output_layout;
  void* gradient = nullptr;  // backward: of the logits, or null
  Layout gradient_layout;
  T* share_sums = nullptr;  // backward: what the weights' gradients are sums of, shaped as the shares, or null
};

// Forward and backward of samples [begin, end); results do not depend on how they are cut into ranges. The backward
// adds to the sums of weights that samples share.
template <class T>
struct AggregateKernels {
  void (*forward)(const AggregateCall<T>&, int64_t begin, int64_t end);
  void (*backward)(const AggregateCall<T>&, int64_t begin, int64_t end);
};

struct AggregateTable {
  AggregateKernels<float> single;
  AggregateKernels<double> real;  // double precision
};

}  // namespace ltk
