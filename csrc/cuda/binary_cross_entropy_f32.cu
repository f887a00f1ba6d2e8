// The kernels of binary_cross_entropy for f32 logits.
#include "cuda/binary_cross_entropy_launch.cuh"

LTK_BINARY_INSTANCES(float, float)
