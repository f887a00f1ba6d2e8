// What the GPU kernels of distillation are asked to do. Torch-free; the kernels behind it are in distillation.cuh, one
// .cu a type of the student's logits.
#pragma once

#include "cuda/cross_entropy.h"

namespace ltk::cuda {

// One call: the student's logits, labels (or null), class_bias, row weights, gradient, tickets and error word as of
// cross_entropy. The state is DistillationRow[rows], 1 / labels, 1 / rows. The rest of the base is not used.
template <class T>
struct DistillationCall : Call<T> {
  const void* teacher;
  ElementType teacher_type;
  Layout teacher_layout;
  bool same_type;                        // the teacher's logits are of the student's type
  T student_scale, teacher_scale;        // inverse temperatures
  const T *student_bias, *teacher_bias;  // or null
  T kd_weight, ce_weight;
  int threads_a_row;  // of a backward

  LTK_HOST_DEVICE_MEMBER T* inverses() const { return this->state + 7 * this->rows; }
};

// E: the type of the student's logits. Memory that a forward needs for partial sums, in doubles. `error` is null, or
// what CUDA says is wrong.
template <class E, class T>
int64_t distillation_partials(const DistillationCall<T>& call, const char** error);

// Start the kernel on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* distillation_forward(const DistillationCall<T>& call, void* stream);
template <class E, class T>
const char* distillation_backward(const DistillationCall<T>& call, void* stream);

}  // namespace ltk::cuda
