// Which kernel serves a call of row_cross_entropy, and on how many threads. Decisions depend on shapes and on the
// device alone, so a call has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/cross_entropy_launch.cuh"
#include "cuda/row_cross_entropy.cuh"

namespace ltk::cuda {

template <class T>
int64_t row_forward_partials_of(const RowCall<T>& call, const char** error) {
  simt::Device device;
  if ((*error = simt::current_device(&device)) != nullptr || call.reduction == Reduction::none) return 0;
  return 4 * any_launch(call, device, 2, nullptr).blocks;  // two sums for each of two labels
}

template <class T>
int64_t row_column_splits_of(const RowCall<T>& call, const char** error) {
  simt::Device device;
  if ((*error = simt::current_device(&device)) != nullptr) return 0;
  return column_splits_of(call, device);
}

template <class E, class T>
const char* row_forward_of(const RowCall<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  const simt::Launch how = any_launch(call, device, 2, stream);
  const int a_row = threads_a_row(call);
  if (a_row == 1) return simt::launch(how, &row_forward_kernel<E, T, 1>, call);
  if (a_row == 32) return simt::launch(how, &row_forward_kernel<E, T, 32>, call);
  return simt::launch(how, &row_forward_kernel<E, T, 256>, call);
}

template <class E, class T>
const char* row_backward_of(const RowCall<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.scale_sums != nullptr || call.bias_sums != nullptr) {
    const int tiles = int(std::min<int64_t>(column_chunks(call.classes), 65535));
    const int64_t shared_bytes = shared_header + row_columns_together * int64_t(sizeof(BackwardRow<T>));
    return simt::launch({column_splits_of(call, device), tiles, column_threads, 1, shared_bytes, stream},
                        &row_backward_columns<E, T>, call);
  }
  if (call.rows == 0) return nullptr;
  const simt::Launch how = any_launch(call, device, 4, stream);
  const int a_row = threads_a_row(call);
  if (a_row == 1) return simt::launch(how, &row_backward_kernel<E, T, 1>, call);
  if (a_row == 32) return simt::launch(how, &row_backward_kernel<E, T, 32>, call);
  return simt::launch(how, &row_backward_kernel<E, T, 256>, call);
}

}  // namespace ltk::cuda

// Defines the kernels of one type of logits. Each type is a compilation of its own, so that they run side by side.
#define LTK_ROW_CROSS_ENTROPY_INSTANCES(E, T)                                      \
  namespace ltk::cuda {                                                            \
  template <>                                                                      \
  int64_t row_forward_partials<E, T>(const RowCall<T>& call, const char** error) { \
    return row_forward_partials_of(call, error);                                   \
  }                                                                                \
  template <>                                                                      \
  int64_t row_column_splits<E, T>(const RowCall<T>& call, const char** error) {    \
    return row_column_splits_of(call, error);                                      \
  }                                                                                \
  template <>                                                                      \
  const char* row_forward<E, T>(const RowCall<T>& call, void* stream) {            \
    return row_forward_of<E>(call, stream);                                        \
  }                                                                                \
  template <>                                                                      \
  const char* row_backward<E, T>(const RowCall<T>& call, void* stream) {           \
    return row_backward_of<E>(call, stream);                                       \
  }                                                                                \
  }
