// How a call of binary_cross_entropy is cut into blocks. Decisions depend on shapes and on the device alone, so a call
// has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/binary_cross_entropy.cuh"
#include "cuda/cross_entropy_launch.cuh"

namespace ltk::cuda {

template <class T>
int64_t binary_row_blocks(const BinaryCall<T>& call, int threads, const simt::Device& device) {
  const int64_t wanted = divide_up(call.rows, threads / call.threads_a_row);
  return std::max<int64_t>(1, std::min(wanted, int64_t(device.multiprocessors) * (2048 / threads) * 2));
}

template <class E, class T>
const char* plan_binary_of(BinaryCall<T>* call) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  call->threads_a_row = threads_a_row(*call);
  const int threads = any_threads(call->threads_a_row);
  call->row_blocks = binary_row_blocks(*call, threads, device);
  call->chunks = call->splits = 0;
  if (call->column_sums) {
    // A thread has several rows at least, or the last split would do much of the work.
    call->chunks = divide_up(call->classes, threads);
    const int64_t wanted = divide_up(int64_t(device.multiprocessors) * (1024 / threads), call->chunks);
    call->splits = std::max<int64_t>(1, std::min(wanted, divide_up(call->rows, 8)));
  }
  return nullptr;
}

template <class E, class T>
const char* binary_forward_of(const BinaryCall<T>& call, void* stream) {
  const int threads = any_threads(call.threads_a_row);
  const simt::Launch how{call.chunks * call.splits + call.row_blocks, 1, threads, 1, shared_header, stream};
  if (call.threads_a_row == 1) return simt::launch(how, &binary_forward_kernel<E, T, 1>, call);
  if (call.threads_a_row == 32) return simt::launch(how, &binary_forward_kernel<E, T, 32>, call);
  return simt::launch(how, &binary_forward_kernel<E, T, 256>, call);
}

template <class E, class T>
const char* binary_backward_of(BinaryCall<T> call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.rows == 0) return nullptr;
  call.threads_a_row = threads_a_row(call);
  const int threads = any_threads(call.threads_a_row);
  const simt::Launch how{binary_row_blocks(call, threads, device), 1, threads, 1, shared_header, stream};
  if (call.threads_a_row == 1) return simt::launch(how, &binary_backward_kernel<E, T, 1>, call);
  if (call.threads_a_row == 32) return simt::launch(how, &binary_backward_kernel<E, T, 32>, call);
  return simt::launch(how, &binary_backward_kernel<E, T, 256>, call);
}

}  // namespace ltk::cuda

// Defines the kernels of one type of logits. Each type is a compilation of its own, so that they run side by side.
#define LTK_BINARY_INSTANCES(E, T)                                             \
  namespace ltk::cuda {                                                        \
  template <>                                                                  \
  const char* plan_binary<E, T>(BinaryCall<T> * call) {                        \
    return plan_binary_of<E, T>(call);                                         \
  }                                                                            \
  template <>                                                                  \
  const char* binary_forward<E, T>(const BinaryCall<T>& call, void* stream) {  \
    return binary_forward_of<E, T>(call, stream);                              \
  }                                                                            \
  template <>                                                                  \
  const char* binary_backward<E, T>(const BinaryCall<T>& call, void* stream) { \
    return binary_backward_of<E, T>(call, stream);                             \
  }                                                                            \
  }
