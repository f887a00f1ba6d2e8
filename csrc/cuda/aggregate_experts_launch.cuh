// Which kernel serves a call of the experts' mean, and on how many threads. Decisions depend on shapes and on the
// device alone, so a call has the same bits every time.
#pragma once

#include "cuda/aggregate_experts.cuh"
#include "cuda/expert_launch.cuh"

namespace ltk::cuda {

template <class T>
bool has_backward_vectors(const AggregateCall<T>& call) {
  return has_vectors(call) && call.grad_layout.stride_class == 1 &&
         (call.gradient == nullptr || call.gradient_layout.stride_class == 1);
}

template <class T>
int64_t aggregate_experts_partials_of(const AggregateCall<T>& call, const char** error) {
  simt::Device device;
  if ((*error = simt::current_device(&device)) != nullptr) return 0;
  return call.experts * expert_launch(call, device, has_backward_vectors(call), nullptr).blocks;
}

template <class E, class T>
const char* aggregate_experts_forward_of(const AggregateCall<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  const bool vectors = has_vectors(call);
  const simt::Launch how = expert_launch(call, device, vectors, stream);
  const int a_row = threads_a_sample(call, device, vectors);
  if constexpr (sizeof(T) == 4)
    if (vectors)
      return simt::launch(how,
                          a_row == 32 ? &aggregate_experts_forward_kernel<E, T, 32, true>
                                      : &aggregate_experts_forward_kernel<E, T, 256, true>,
                          call);
  if (a_row == 1) return simt::launch(how, &aggregate_experts_forward_kernel<E, T, 1, false>, call);
  return simt::launch(how, &aggregate_experts_forward_kernel<E, T, 32, false>, call);
}

template <class E, class T>
const char* aggregate_experts_backward_of(const AggregateCall<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.weight_sums != nullptr && call.by_class()) {  // before a gradient replaces logits
    const simt::Launch how{divide_up(call.classes, weight_columns),
                           1,
                           weight_threads,
                           1,
                           shared_header + weight_threads * int64_t(sizeof(T)),
                           stream};
    if (const char* error = simt::launch(how, &aggregate_class_weights_kernel<E, T>, call)) return error;
  }
  if (call.gradient == nullptr && !call.sums_weights()) return nullptr;
  const bool vectors = has_backward_vectors(call);
  const simt::Launch how = expert_launch(call, device, vectors, stream);
  const int a_row = threads_a_sample(call, device, vectors);
  if constexpr (sizeof(T) == 4)
    if (vectors)
      return simt::launch(how,
                          a_row == 32 ? &aggregate_experts_backward_kernel<E, T, 32, true>
                                      : &aggregate_experts_backward_kernel<E, T, 256, true>,
                          call);
  if (a_row == 1) return simt::launch(how, &aggregate_experts_backward_kernel<E, T, 1, false>, call);
  return simt::launch(how, &aggregate_experts_backward_kernel<E, T, 32, false>, call);
}

}  // namespace ltk::cuda

// Defines the kernels of one type of logits. Each type is a compilation of its own, so that they run side by side.
#define LTK_AGGREGATE_EXPERTS_INSTANCES(E, T)                                                  \
  namespace ltk::cuda {                                                                        \
  template <>                                                                                  \
  int64_t aggregate_experts_partials<E, T>(const AggregateCall<T>& call, const char** error) { \
    return aggregate_experts_partials_of(call, error);                                         \
  }                                                                                            \
  template <>                                                                                  \
  const char* aggregate_experts_forward<E, T>(const AggregateCall<T>& call, void* stream) {    \
    return aggregate_experts_forward_of<E>(call, stream);                                      \
  }                                                                                            \
  template <>                                                                                  \
  const char* aggregate_experts_backward<E, T>(const AggregateCall<T>& call, void* stream) {   \
    return aggregate_experts_backward_of<E>(call, stream);                                     \
  }                                                                                            \
  }
