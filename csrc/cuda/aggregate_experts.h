// What the GPU kernels of the experts' mean are asked to do. Torch-free; the kernels behind it are in
// aggregate_experts.cuh, one .cu a type of logits.
#pragma once

#include "common/expert_mean.h"
#include "cuda/cross_entropy.h"

namespace ltk::cuda {

// One call: logits (row e N + i is sample i of expert e), gradient, tickets and error word as of cross_entropy, `rows`
// are samples. The state (ltkernels/ops/aggregate_experts.py) is maximum and 1 / sum of each sample and expert unless
// the mean is of logits, `best`, `confidence`, 1. `partials` has a sum of each expert a block. The rest of the base is
// not used.
template <class T>
struct AggregateCall : Call<T> {
  int64_t experts, topk;
  AggregateMode mode;
  ExpertWeights weights;
  const T* expert_weight;  // [experts], [samples, experts] or [experts, classes]; null for equal ones
  void* best;              // [samples, topk], integers of T's size
  T* confidence;           // [samples, topk]
  void* output;            // forward: [samples, classes] of the logits' type
  const void* grad;        // backward: of the output
  Layout grad_layout;
  T* weight_sums;  // backward: of the weights, shaped as they are, or null
  T* terms;        // backward of weights by expert: [samples, experts]

  LTK_HOST_DEVICE_MEMBER T* softmax(int64_t sample, int64_t expert) const {
    return this->state + 2 * (sample * experts + expert);
  }
  LTK_HOST_DEVICE_MEMBER T* end() const { return confidence + this->rows * topk; }  // the 1 that a backward checks
  LTK_HOST_DEVICE_MEMBER bool by_class() const { return weights == ExpertWeights::classes; }
  // The gradient of the weights is a sum over a sample's classes, or over more.
  LTK_HOST_DEVICE_MEMBER bool sums_weights() const { return weight_sums != nullptr && !by_class(); }
};

// E: the type of the logits. Memory that a backward needs for partial sums, in doubles. `error` is null, or what CUDA
// says is wrong.
template <class E, class T>
int64_t aggregate_experts_partials(const AggregateCall<T>& call, const char** error);

// Start the kernels on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* aggregate_experts_forward(const AggregateCall<T>& call, void* stream);
template <class E, class T>
const char* aggregate_experts_backward(const AggregateCall<T>& call, void* stream);

}  // namespace ltk::cuda
