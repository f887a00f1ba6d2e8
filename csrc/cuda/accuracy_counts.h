// What the GPU kernels of accuracy_counts are asked to do. Torch-free; the kernels behind it are in accuracy_counts.cu.
#pragma once

#include "common/accuracy_counts.h"

namespace ltk::cuda {

struct AccuracyLaunch : AccuracyCall {
  int* error;      // a word that the host looks at: see Error of cuda/cross_entropy.h
  bool in_shared;  // set by the launcher: blocks count for themselves first
};

// Starts the kernel on a stream of the current device; null, or what CUDA says is wrong.
const char* accuracy_counts(AccuracyLaunch call, void* stream);

}  // namespace ltk::cuda
