// On how many threads the kernels of several experts run. Decisions depend on shapes and on the device alone, so a call
// has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/cross_entropy_launch.cuh"
#include "cuda/expert_rows.cuh"

namespace ltk::cuda {

// Threads that share a sample: a block for long rows, and for short ones where samples are too few for a warp each.
template <class T>
int threads_a_sample(const Call<T>& call, const simt::Device& device, bool vectors) {
  const int a_row = threads_a_row(call);
  if (!vectors) return a_row == 256 ? 32 : a_row;  // rare: not a kernel more
  return call.classes > 256 && call.rows < int64_t(device.multiprocessors) * 16 ? 256 : a_row;
}

// Blocks for all samples, or so many that the device is full twice.
template <class T>
simt::Launch expert_launch(const Call<T>& call, const simt::Device& device, bool vectors, void* stream) {
  const int a_row = threads_a_sample(call, device, vectors), threads = any_threads(a_row);
  const int64_t most = int64_t(device.multiprocessors) * (2048 / threads) * 2;
  return {std::max<int64_t>(1, std::min(divide_up(call.rows, threads / a_row), most)),
          1,
          threads,
          1,
          shared_header + reduced_bytes<T>,
          stream};
}

}  // namespace ltk::cuda
