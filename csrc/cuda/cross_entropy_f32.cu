// The kernels of cross_entropy for f32 logits.
#include "cuda/cross_entropy_instances.cuh"

LTK_CROSS_ENTROPY_INSTANCES(float, float)

namespace ltk::cuda {
const char* probe() {
  simt::Device device;
  return simt::current_device(&device);
}
}  // namespace ltk::cuda
