// Marks functions that CPU and GPU code share.
#pragma once

#if defined(__CUDACC__)
  #define LTK_HOST_DEVICE_MEMBER __host__ __device__
#else
  #define LTK_HOST_DEVICE_MEMBER
#endif

// Internal linkage: the CPU kernels are compiled once per instruction set, and a merged copy of an inline function
// might use instructions that the processor does not have.
#define LTK_HOST_DEVICE static LTK_HOST_DEVICE_MEMBER inline
