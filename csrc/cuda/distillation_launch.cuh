// Which kernel serves a call of distillation, and on how many threads. Decisions depend on shapes and on the device
// alone, so a call has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/cross_entropy_launch.cuh"
#include "cuda/distillation.cuh"

namespace ltk::cuda {

template <class T>
bool has_vector_pairs(const DistillationCall<T>& call) {
  return has_vectors(call) && call.same_type && call.teacher_layout.stride_class == 1;
}

template <class T>
int64_t distillation_partials_of(const DistillationCall<T>& call, const char** error) {
  simt::Device device;
  if ((*error = simt::current_device(&device)) != nullptr || call.reduction == Reduction::none) return 0;
  return 4 * any_launch(call, device, 2, nullptr).blocks;  // two sums for each of two parts
}

template <class E, class T>
const char* distillation_forward_of(const DistillationCall<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  const simt::Launch how = any_launch(call, device, 2, stream);
  const int a_row = threads_a_row(call);
  if constexpr (sizeof(T) == 4)
    if (has_vector_pairs(call))
      return simt::launch(
          how,
          a_row == 32 ? &distillation_forward_kernel<E, T, 32, true> : &distillation_forward_kernel<E, T, 256, true>,
          call);
  if (a_row == 1) return simt::launch(how, &distillation_forward_kernel<E, T, 1, false>, call);
  if (a_row == 32) return simt::launch(how, &distillation_forward_kernel<E, T, 32, false>, call);
  return simt::launch(how, &distillation_forward_kernel<E, T, 256, false>, call);
}

template <class E, class T>
const char* distillation_backward_of(DistillationCall<T> call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.rows == 0) return nullptr;
  call.threads_a_row = threads_a_row(call);
  constexpr int threads = distillation_threads;
  const int64_t most = int64_t(device.multiprocessors) * (2048 / threads);
  const int64_t blocks = std::min(divide_up(call.rows, threads / call.threads_a_row), most * 4);
  // Columns are split while there are not blocks enough, each with a group for every thread.
  const int64_t tiles = std::min(divide_up(most, blocks), divide_up(call.classes, int64_t(call.threads_a_row) * 8));
  const simt::Launch how{blocks, int(tiles), threads, 1, shared_header, stream};
  if constexpr (sizeof(T) == 4)
    if (has_vector_pairs(call) && call.gradient_layout.stride_class == 1)
      return simt::launch(how, &distillation_backward_kernel<E, T, true>, call);
  return simt::launch(how, &distillation_backward_kernel<E, T, false>, call);
}

}  // namespace ltk::cuda

// Defines the kernels of one type of the student's logits. Each type is a compilation of its own, so that they run side
// by side.
#define LTK_DISTILLATION_INSTANCES(E, T)                                                     \
  namespace ltk::cuda {                                                                      \
  template <>                                                                                \
  int64_t distillation_partials<E, T>(const DistillationCall<T>& call, const char** error) { \
    return distillation_partials_of(call, error);                                            \
  }                                                                                          \
  template <>                                                                                \
  const char* distillation_forward<E, T>(const DistillationCall<T>& call, void* stream) {    \
    return distillation_forward_of<E>(call, stream);                                         \
  }                                                                                          \
  template <>                                                                                \
  const char* distillation_backward<E, T>(const DistillationCall<T>& call, void* stream) {   \
    return distillation_backward_of<E>(call, stream);                                        \
  }                                                                                          \
  }
