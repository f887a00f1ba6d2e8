// How a call of LADE is cut into blocks, and which kernel serves it. Decisions depend on shapes and on the device
// alone, so a call has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/cross_entropy_launch.cuh"
#include "cuda/lade.cuh"

namespace ltk::cuda {

// Whether every row of a layout starts where 16-byte accesses do.
template <class E>
bool has_aligned_rows(const void* memory, const Layout& l) {
  const auto aligned = [](int64_t stride) { return stride % width<E> == 0; };
  return reinterpret_cast<uintptr_t>(memory) % sizeof(Vector) == 0 && aligned(l.stride_outer) &&
         (l.inner == 1 || aligned(l.stride_inner));
}

// A chunk's columns are a warp's, or, where neighbouring rows are nearer, 8: at least 8 classes share a ticket
// (ltkernels/ops/lade.py). Rows are split until there are blocks enough, each with several rows for every lane.
template <class E, class T>
void cut_columns(const LadeCall<T>& call, int threads, int64_t blocks, LadeGrid* grid) {
  const int vector = lade_vector(width<E>, grid->access);
  grid->rows_first = threads_a_row(call) == 1;
  const int most = grid->rows_first ? 8 : simt::warp_size;
  grid->width = 1;
  while (grid->width < most && grid->width * vector < call.classes) grid->width *= 2;
  grid->chunks = divide_up(call.classes, int64_t(grid->width) * vector);
  const int64_t rows = threads / grid->width * 4;
  grid->splits = std::max<int64_t>(1, std::min(divide_up(blocks, grid->chunks), divide_up(call.rows, rows)));
}

template <class E, class T>
const char* plan_lade_of(LadeCall<T>* call) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  LadeGrid& grid = call->grid;
  grid.access = LadeAccess::any;
  if (has_vectors(*call))
    grid.access = call->classes % width<E> == 0 && has_aligned_rows<E>(call->input, call->input_layout)
                      ? LadeAccess::aligned
                      : LadeAccess::rows;
  grid.threads_a_row = threads_a_row(*call);
  if (grid.access == LadeAccess::any && grid.threads_a_row == 256) grid.threads_a_row = 32;  // rare: not a kernel more
  const int threads = any_threads(grid.threads_a_row);
  if (call->strength > T(0))
    cut_columns<E, T>(*call, threads, int64_t(device.multiprocessors) * (1024 / threads), &grid);
  else
    grid.chunks = grid.splits = 0;
  const int64_t wanted = divide_up(call->rows, threads / grid.threads_a_row);
  grid.row_blocks = std::max<int64_t>(1, std::min(wanted, int64_t(device.multiprocessors) * (2048 / threads) * 2));
  return nullptr;
}

template <class E, class T>
const char* lade_forward_of(const LadeCall<T>& call, void* stream) {
  const LadeGrid& grid = call.grid;
  const int threads = any_threads(grid.threads_a_row);
  const simt::Launch how{grid.chunks * grid.splits + grid.row_blocks,      1,     threads, 1,
                         shared_header + 5 * threads * int64_t(sizeof(T)), stream};
  constexpr LadeAccess any = LadeAccess::any, rows = LadeAccess::rows, aligned = LadeAccess::aligned;
  if constexpr (sizeof(T) == 4) {
    const bool whole_block = grid.threads_a_row == 256;
    if (grid.access == aligned)
      return simt::launch(
          how, whole_block ? &lade_forward_kernel<E, T, 256, aligned> : &lade_forward_kernel<E, T, 32, aligned>, call);
    if (grid.access == rows)
      return simt::launch(
          how, whole_block ? &lade_forward_kernel<E, T, 256, rows> : &lade_forward_kernel<E, T, 32, rows>, call);
  }
  if (grid.threads_a_row == 1) return simt::launch(how, &lade_forward_kernel<E, T, 1, any>, call);
  return simt::launch(how, &lade_forward_kernel<E, T, 32, any>, call);
}

template <class E, class T>
const char* lade_backward_of(LadeCall<T> call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.rows == 0) return nullptr;
  LadeGrid& grid = call.grid;
  const bool vectors = sizeof(T) == 4 && call.input_layout.stride_class == 1 &&
                       call.gradient_layout.stride_class == 1 && call.classes % width<E> == 0 &&
                       has_aligned_rows<E>(call.input, call.input_layout) &&
                       has_aligned_rows<E>(call.gradient, call.gradient_layout);
  grid.access = vectors ? LadeAccess::aligned : LadeAccess::any;
  cut_columns<E, T>(call, lade_backward_threads, int64_t(device.multiprocessors) * 32, &grid);
  const simt::Launch how{grid.chunks * grid.splits, 1, lade_backward_threads, 1, shared_header, stream};
  if constexpr (sizeof(T) == 4)
    if (vectors) return simt::launch(how, &lade_backward_kernel<E, T, LadeAccess::aligned>, call);
  return simt::launch(how, &lade_backward_kernel<E, T, LadeAccess::any>, call);
}

}  // namespace ltk::cuda

// Defines the kernels of one type of logits. Each type is a compilation of its own, so that they run side by side.
#define LTK_LADE_INSTANCES(E, T)                                           \
  namespace ltk::cuda {                                                    \
  template <>                                                              \
  const char* plan_lade<E, T>(LadeCall<T> * call) {                        \
    return plan_lade_of<E, T>(call);                                       \
  }                                                                        \
  template <>                                                              \
  const char* lade_forward<E, T>(const LadeCall<T>& call, void* stream) {  \
    return lade_forward_of<E, T>(call, stream);                            \
  }                                                                        \
  template <>                                                              \
  const char* lade_backward<E, T>(const LadeCall<T>& call, void* stream) { \
    return lade_backward_of<E, T>(call, stream);                           \
  }                                                                        \
  }
