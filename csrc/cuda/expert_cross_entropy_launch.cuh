// Which kernel serves a call of several experts' losses, and on how many threads. Decisions depend on shapes and on the
// device alone, so a call has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/expert_cross_entropy_backward.cuh"
#include "cuda/expert_launch.cuh"

namespace ltk::cuda {

template <class T>
bool has_expert_vectors(const ExpertCrossEntropyCall<T>& call) {
  return has_vectors(call) && (call.teacher == nullptr || (call.same_type && call.teacher_layout.stride_class == 1));
}

template <class T>
int64_t expert_cross_entropy_partials_of(const ExpertCrossEntropyCall<T>& call, const char** error) {
  simt::Device device;
  if ((*error = simt::current_device(&device)) != nullptr || call.reduction == Reduction::none) return 0;
  return 2 * (call.experts + 1) * expert_launch(call, device, has_expert_vectors(call), nullptr).blocks;
}

template <class E, class T>
const char* expert_cross_entropy_forward_of(const ExpertCrossEntropyCall<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  const simt::Launch how = expert_launch(call, device, has_expert_vectors(call), stream);
  const int a_row = threads_a_sample(call, device, has_expert_vectors(call));
  if constexpr (sizeof(T) == 4)
    if (has_expert_vectors(call))
      return simt::launch(how,
                          a_row == 32 ? &expert_cross_entropy_forward_kernel<E, T, 32, true>
                                      : &expert_cross_entropy_forward_kernel<E, T, 256, true>,
                          call);
  if (a_row == 1) return simt::launch(how, &expert_cross_entropy_forward_kernel<E, T, 1, false>, call);
  return simt::launch(how, &expert_cross_entropy_forward_kernel<E, T, 32, false>, call);
}

template <class E, class T>
const char* expert_cross_entropy_backward_of(ExpertCrossEntropyCall<T> call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.rows == 0) return nullptr;
  call.threads_a_row = threads_a_row(call);
  constexpr int threads = expert_backward_threads;
  const int64_t most = int64_t(device.multiprocessors) * (2048 / threads);
  const int64_t blocks = std::min(divide_up(call.rows, threads / call.threads_a_row), most * 4);
  // Columns are split while there are not blocks enough, each with a group for every thread.
  const int64_t tiles = std::min(divide_up(most, blocks), divide_up(call.classes, int64_t(call.threads_a_row) * 8));
  const simt::Launch how{blocks, int(tiles), threads, 1, shared_header, stream};
  if constexpr (sizeof(T) == 4)
    if (has_expert_vectors(call) && call.gradient_layout.stride_class == 1)
      return simt::launch(how, &expert_cross_entropy_backward_kernel<E, T, true>, call);
  return simt::launch(how, &expert_cross_entropy_backward_kernel<E, T, false>, call);
}

}  // namespace ltk::cuda

// Defines the kernels of one type of logits. Each type is a compilation of its own, so that they run side by side.
#define LTK_EXPERT_CROSS_ENTROPY_INSTANCES(E, T)                                                           \
  namespace ltk::cuda {                                                                                    \
  template <>                                                                                              \
  int64_t expert_cross_entropy_partials<E, T>(const ExpertCrossEntropyCall<T>& call, const char** error) { \
    return expert_cross_entropy_partials_of(call, error);                                                  \
  }                                                                                                        \
  template <>                                                                                              \
  const char* expert_cross_entropy_forward<E, T>(const ExpertCrossEntropyCall<T>& call, void* stream) {    \
    return expert_cross_entropy_forward_of<E>(call, stream);                                               \
  }                                                                                                        \
  template <>                                                                                              \
  const char* expert_cross_entropy_backward<E, T>(const ExpertCrossEntropyCall<T>& call, void* stream) {   \
    return expert_cross_entropy_backward_of<E>(call, stream);                                              \
  }                                                                                                        \
  }
