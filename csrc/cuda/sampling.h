// What the GPU kernel of sampling does. Torch-free; the kernel behind it is in sampling.cu.
#pragma once

#include "common/sampling.h"

namespace ltk::cuda {

// Starts the kernel on a stream of the current device; null, or what CUDA says is wrong. call.out is aligned to 16
// bytes, and start_at and epoch_at are read by the kernel: nothing waits for what they are.
const char* sample_indices(const SamplingCall& call, void* stream);

}  // namespace ltk::cuda
