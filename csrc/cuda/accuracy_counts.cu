// The kernels of accuracy_counts: one launch, which reads each logit at most once.
//
// The threads that share a row count how many classes come before its label's. Each warp leaves a row that is wrong as
// soon as it has found as many as that takes, which saves reading the rest. The thread that finishes a row adds it to
// its class: sums of integers, which do not depend on who comes first. Where rows are many and classes few (pixels),
// the additions would wait for one another in L2; there a block counts in shared memory and adds its counts at its end.
#include <algorithm>

#include "cuda/accuracy_counts.h"
#include "cuda/cross_entropy_any.cuh"

namespace ltk::cuda {

constexpr int label_threads = 256;
constexpr int held_groups = 4;                          // loads of a thread that are on the way together
constexpr int64_t most_shared_bytes = 32 * 1024;        // of a block's counts
constexpr int64_t most_shared_rows = int64_t(1) << 30;  // of a block: its counts are int

// --- Counting rows ---

LTK_DEVICE int* block_counts() { return reinterpret_cast<int*>(simt::shared_memory() + shared_header); }

LTK_DEVICE void begin_counts(const AccuracyLaunch& call) {
  if (!call.in_shared) return;
  for (int64_t at = simt::thread(); at < 2 * call.classes; at += simt::threads()) block_counts()[at] = 0;
  simt::sync_block();
}

LTK_DEVICE void count_row(const AccuracyLaunch& call, int64_t y, bool right) {
  if (call.in_shared) {
    simt::add(block_counts() + y, 1);
    if (right) simt::add(block_counts() + call.classes + y, 1);
  } else {
    simt::add(call.total + y, int64_t(1));
    if (right) simt::add(call.correct + y, int64_t(1));
  }
}

LTK_DEVICE void end_counts(const AccuracyLaunch& call) {
  if (!call.in_shared) return;
  simt::sync_block();
  for (int64_t y = simt::thread(); y < call.classes; y += simt::threads()) {
    const int rows = block_counts()[y], right = block_counts()[call.classes + y];
    if (rows != 0) simt::add(call.total + y, int64_t(rows));
    if (right != 0) simt::add(call.correct + y, int64_t(right));
  }
}

// --- Rows of logits ---

// Whether the threads that have found `before` classes between them need look no further.
template <int a_row>
LTK_DEVICE bool enough(const AccuracyLaunch& call, int before) {
  if constexpr (a_row > 1) before = simt::warp_sum(before);
  return before >= call.top_k;
}

// 16 bytes at a time, where classes lie side by side.
template <class E, int a_row>
LTK_DEVICE int count_vectors(const AccuracyLaunch& call, int64_t offset, int y, float own, int first) {
  constexpr int n = width<E>;
  const AlignedRow<E> row(call.input, offset, call.classes);
  const int vectors = row.vectors();
  int before = 0;
  // All lanes of a warp go on or leave together: the warp's first lane decides.
  for (int start = first - first % simt::warp_size; start < vectors; start += held_groups * a_row) {
    Vector held[held_groups];
#pragma unroll
    for (int g = 0; g < held_groups; ++g) {
      const int v = start + lane() + g * a_row;
      if (v < vectors) held[g] = row.load(v);
    }
#pragma unroll
    for (int g = 0; g < held_groups; ++g) {
      const int v = start + lane() + g * a_row;
      if (v >= vectors) continue;
      float x[n];
      decode(held[g], x, E{});
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const int j = row.first(v) + k;
        before += j >= 0 && j < row.classes && j != y && comes_before(x[k], j < y, own);
      }
    }
    if (enough<a_row>(call, before)) break;
  }
  return before;
}

// Any strides: neighbouring threads at neighbouring columns.
template <class E, class T, int a_row>
LTK_DEVICE int count_any(const AccuracyLaunch& call, int64_t offset, int64_t y, T own, int first) {
  const E* row = static_cast<const E*>(call.input) + offset;
  const int64_t stride = call.input_layout.stride_class;
  int before = 0;
  for (int64_t start = first; start - first % simt::warp_size < call.classes; start += held_groups * a_row) {
    T x[held_groups];
#pragma unroll
    for (int g = 0; g < held_groups; ++g) {
      const int64_t j = start + g * a_row;
      x[g] = j < call.classes ? T(widen(row[j * stride])) : own;
    }
#pragma unroll
    for (int g = 0; g < held_groups; ++g) {
      const int64_t j = start + g * a_row;
      before += j < call.classes && j != y && comes_before(x[g], j < y, own);
    }
    if (enough<a_row>(call, before)) break;
  }
  return before;
}

template <class E, class T, int a_row, bool vectors>
LTK_DEVICE void count_rows(const AccuracyLaunch& call) {
  constexpr int rows = any_threads(a_row) / a_row;  // of a block at a time
  const int first = simt::thread() % a_row;
  begin_counts(call);
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows) {
    const CountedLabel label = counted_label(call, r);
    if (label.ignored || !label.in_range) {
      if (!label.ignored && first == 0) *call.error = label_not_counted;
      continue;
    }
    const int64_t offset = call.input_layout.offset(r);
    const T own = T(widen(static_cast<const E*>(call.input)[offset + label.y * call.input_layout.stride_class]));
    int before;
    if constexpr (vectors)
      before = count_vectors<E, a_row>(call, offset, int(label.y), own, first);
    else
      before = count_any<E, T, a_row>(call, offset, label.y, own, first);
    before = row_sum<a_row>(before);
    if (first == 0) count_row(call, label.y, before < call.top_k);
  }
  end_counts(call);
}

template <class E, int a_row>
LTK_KERNEL(any_threads(a_row), 1024 / any_threads(a_row))
accuracy_counts_vectors(const AccuracyLaunch call) {
  LTK_ASSUME(call.input_layout.stride_class == 1);
  count_rows<E, float, a_row, true>(call);
}

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), 1024 / any_threads(a_row))
accuracy_counts_any(const AccuracyLaunch call) {
  count_rows<E, T, a_row, false>(call);
}

// --- Predicted labels ---

LTK_KERNEL(label_threads, 8) accuracy_counts_labels(const AccuracyLaunch call) {
  begin_counts(call);
  for (int64_t r = simt::block() * label_threads + simt::thread(); r < call.rows; r += simt::blocks() * label_threads) {
    const CountedLabel label = counted_label(call, r);
    if (label.ignored) continue;
    const int64_t predicted = predicted_label(call, r);
    const bool possible = predicted >= 0 && predicted < call.classes;
    if (!label.in_range || !possible) {
      *call.error = label.in_range ? prediction_not_counted : label_not_counted;
      continue;
    }
    count_row(call, label.y, predicted == label.y);
  }
  end_counts(call);
}

// --- Launches ---

// Threads that share a row: one where neighbouring rows are nearer than neighbouring classes.
static int threads_a_row_of(const AccuracyCall& call, const simt::Device& device) {
  const Layout& l = call.input_layout;
  if (l.stride_class != 1 && (l.inner > 1 ? l.stride_inner : l.stride_outer) == 1) return 1;
  // A warp each, unless rows are too few for all multiprocessors to have warps enough.
  return call.classes <= 1024 || call.rows >= int64_t(device.multiprocessors) * 32 ? 32 : 256;
}

// Blocks for all rows, or so many that the device is full twice. Sets where they count.
static simt::Launch launch_rows(AccuracyLaunch* call, const simt::Device& device, int threads, int64_t rows_a_block,
                                void* stream) {
  const int64_t most = int64_t(device.multiprocessors) * (2048 / threads) * 2;
  const int64_t blocks = std::max<int64_t>(1, std::min((call->rows - 1) / rows_a_block + 1, most));
  const int64_t bytes = 2 * call->classes * int64_t(sizeof(int)), of_block = call->rows / blocks;
  call->in_shared = bytes <= most_shared_bytes && of_block >= call->classes && of_block < most_shared_rows;
  return {blocks, 1, threads, 1, shared_header + (call->in_shared ? bytes : 0), stream};
}

template <class E, class T>
static const char* launch_logits(AccuracyLaunch call, const simt::Device& device, void* stream) {
  const int a_row = threads_a_row_of(call, device), threads = any_threads(a_row);
  const simt::Launch how = launch_rows(&call, device, threads, threads / a_row, stream);
  if constexpr (sizeof(T) == 4)
    if (call.input_layout.stride_class == 1 && call.classes < (int64_t(1) << 31) - 64)
      return simt::launch(how, a_row == 32 ? &accuracy_counts_vectors<E, 32> : &accuracy_counts_vectors<E, 256>, call);
  if (a_row == 1) return simt::launch(how, &accuracy_counts_any<E, T, 1>, call);
  return simt::launch(how, a_row == 32 ? &accuracy_counts_any<E, T, 32> : &accuracy_counts_any<E, T, 256>, call);
}

const char* accuracy_counts(AccuracyLaunch call, void* stream) {
  if (call.rows == 0) return nullptr;
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  switch (call.input_type) {
    case ElementType::f64:
      return launch_logits<double, double>(call, device, stream);
    case ElementType::f32:
      return launch_logits<float, float>(call, device, stream);
    case ElementType::bf16:
      return launch_logits<BFloat16, float>(call, device, stream);
    case ElementType::f16:
      return launch_logits<Float16, float>(call, device, stream);
    default:
      const simt::Launch how = launch_rows(&call, device, label_threads, label_threads, stream);
      return simt::launch(how, &accuracy_counts_labels, call);
  }
}

}  // namespace ltk::cuda
