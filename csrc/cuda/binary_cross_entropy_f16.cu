// The kernels of binary_cross_entropy for f16 logits.
#include "cuda/binary_cross_entropy_launch.cuh"

LTK_BINARY_INSTANCES(Float16, float)
