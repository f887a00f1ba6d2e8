// Marks functions that CPU and GPU code share.
#pragma once

#if defined(__CUDACC__)
  #define LTK_HOST_DEVICE_MEMBER __host__ __device__
  #define LTK_HOST_DEVICE static __host__ __device__ inline
#else
  #define LTK_HOST_DEVICE_MEMBER
  // Part of its caller: the CPU kernels are compiled once per instruction set, and a merged copy of an inline function
  // might use instructions that the processor does not have.
  #define LTK_HOST_DEVICE __attribute__((always_inline)) static inline
#endif
