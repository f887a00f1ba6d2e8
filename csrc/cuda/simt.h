// What the kernels use of the GPU: who a thread is, barriers, shuffles, clusters, the special instructions. Kernels use
// nothing else, so that with LTK_EMULATE they are compiled by a C++ compiler and run on fibers (emulated.h), where
// tests reach them without a GPU.
#pragma once

#include <cstdint>

#if defined(LTK_EMULATE)
  #include "cuda/emulated.h"
#else

  #include <cuda_runtime.h>

  // `blocks` on a multiprocessor at a time bound the registers of a thread; left to itself, the compiler prefers a step
  // of occupancy to the last few of them, and spills.
  #define LTK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
  #define LTK_DEVICE __device__ __forceinline__
  // For the compiler: what the launcher has seen to.
  #define LTK_ASSUME(condition) __builtin_assume(condition)

namespace ltk::simt {

constexpr int warp_size = 32;

LTK_DEVICE int thread() { return int(threadIdx.x); }
LTK_DEVICE int threads() { return int(blockDim.x); }
LTK_DEVICE int64_t block() { return int64_t(blockIdx.x); }
LTK_DEVICE int64_t blocks() { return int64_t(gridDim.x); }
LTK_DEVICE int tile() { return int(blockIdx.y); }  // the second dimension of the grid: columns
LTK_DEVICE int tiles() { return int(gridDim.y); }

LTK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

LTK_DEVICE void sync_block() { __syncthreads(); }

template <class T>
LTK_DEVICE T exchange(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Thread block clusters, sm_90 and later; elsewhere a cluster is one block.
LTK_DEVICE int cluster_size() {
  #if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return int(n);
  #else
  return 1;
  #endif
}
LTK_DEVICE int cluster_rank() {
  #if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
  #else
  return 0;
  #endif
}
LTK_DEVICE void sync_cluster() {
  #if __CUDA_ARCH__ >= 900
  __syncwarp();  // the barrier is one for whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  #else
  __syncthreads();
  #endif
}
// The float at the same place in the shared memory of another block of the cluster.
LTK_DEVICE float read_cluster(const float* mine, int rank) {
  #if __CUDA_ARCH__ >= 900
  const uint32_t here = uint32_t(__cvta_generic_to_shared(mine));
  uint32_t there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
  #else
  return *mine;
  #endif
}

// One number for each block that is done: all that it wrote is visible to whoever draws a later one.
LTK_DEVICE int take_ticket(int* counter) {
  __threadfence();
  const int ticket = atomicAdd(counter, 1);
  __threadfence();
  return ticket;
}

// Of integers alone: their sum does not depend on who comes first.
LTK_DEVICE void add(int* to, int value) { atomicAdd(to, value); }
LTK_DEVICE void add(int64_t* to, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// 16 bytes at once. As an assignment nvcc splits them for sm_80 and sm_90.
LTK_DEVICE void store16(void* to, const uint32_t (&words)[4]) {
  __stwb(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
}

// Asks for the line at this address to be brought into L2.
LTK_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

LTK_DEVICE float exp2(float x) {  // 2 ulp; 0 below the smallest normal number
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LTK_DEVICE double exp2(double x) { return ::exp2(x); }

LTK_DEVICE float from_float16(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
LTK_DEVICE uint16_t to_float16(float f) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
LTK_DEVICE uint16_t to_bfloat16(float f) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
// Two at once, `low` in the low half.
LTK_DEVICE uint32_t to_bfloat16s(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
LTK_DEVICE uint32_t to_float16s(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// What the launcher has to know of the current device, and of the code that it runs there: code for an older
// architecture, translated for this one, knows no clusters.
struct Device {
  int multiprocessors;
  bool clusters;
};

static __global__ void probe() {}

inline const char* current_device(Device* device) {
  static thread_local int known = -1;
  static thread_local Device cached;
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess && index != known) {
    cudaFuncAttributes code = {};
    error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(&probe));
    cached.clusters = code.ptxVersion >= 90;
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&cached.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) known = index;
  }
  *device = cached;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct Launch {
  int64_t blocks;
  int tiles, threads, cluster;
  int64_t shared_bytes;
  void* stream;
};

// Starts `kernel(arguments)`; null, or what is wrong.
template <class Arguments>
const char* launch(const Launch& how, void (*kernel)(Arguments), const Arguments& arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(uint32_t(how.blocks), uint32_t(how.tiles));
  config.blockDim = dim3(uint32_t(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute cluster = {};
  if (how.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(how.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  cudaError_t error = cudaSuccess;
  if (how.shared_bytes > 48 * 1024)  // beyond what every kernel may have without asking
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(how.shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error != cudaSuccess) cudaGetLastError();  // or the next call would be told of it too
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ltk::simt

#endif

namespace ltk::simt {

// Over the lanes of a warp, in a fixed order; every lane gets the result.
template <class T>
LTK_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += exchange(value, mask);
  return value;
}
template <class T>
LTK_DEVICE T warp_max(T value) {
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2) {
    const T other = exchange(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace ltk::simt
