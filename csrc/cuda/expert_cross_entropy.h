// What the GPU kernels of several experts' losses are asked to do. Torch-free; the kernels behind it are in
// expert_cross_entropy.cuh, one .cu a type of logits.
#pragma once

#include "common/expert_row.h"
#include "cuda/cross_entropy.h"

namespace ltk::cuda {

// One call: logits (row e N + i is sample i of expert e), labels, row weights, gradient, loss, tickets and error word
// as of cross_entropy, `rows` are samples; scale, bias, margin and weight are [experts, classes]. The state begins at
// the samples': 5 E + 6 numbers each, 1 / denominator of each expert, 1 / samples (ltkernels/ops/). `partials` has two
// sums of each expert and of the divergences a block. The rest of the base is not
// used.
template <class T>
struct ExpertCrossEntropyCall : Call<T> {
  int64_t experts;
  T diversity;           // factor of the divergences from the mean; 0 for none
  const T* temperature;  // [classes + 1], one over it, then another factor of the divergences; or null
  const void* teacher;   // or null
  ElementType teacher_type;
  Layout teacher_layout;
  bool same_type;  // the teacher's logits are of the experts' type
  T distillation, distillation_scale;
  T* mean;            // forward: [samples, classes] of the mean logits, or null
  double* terms;      // forward: [samples, E + 1], each to be divided by its own denominator
  int threads_a_row;  // of a backward

  LTK_HOST_DEVICE_MEMBER ExpertState<T>* of_experts(int64_t sample) const {
    return reinterpret_cast<ExpertState<T>*>(this->state + sample * (5 * experts + 6));
  }
  LTK_HOST_DEVICE_MEMBER SampleState<T>* of_sample(int64_t sample) const {
    return reinterpret_cast<SampleState<T>*>(this->state + sample * (5 * experts + 6) + 5 * experts);
  }
  LTK_HOST_DEVICE_MEMBER T* inverse_denominators() const { return this->state + this->rows * (5 * experts + 6); }
  LTK_HOST_DEVICE_MEMBER T* inverse_count() const { return inverse_denominators() + experts; }
};

// E: the type of the logits. Memory that a forward needs for partial sums, in doubles. `error` is null, or what CUDA
// says is wrong.
template <class E, class T>
int64_t expert_cross_entropy_partials(const ExpertCrossEntropyCall<T>& call, const char** error);

// Start the kernel on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* expert_cross_entropy_forward(const ExpertCrossEntropyCall<T>& call, void* stream);
template <class E, class T>
const char* expert_cross_entropy_backward(const ExpertCrossEntropyCall<T>& call, void* stream);

}  // namespace ltk::cuda
