// The kernels of binary_cross_entropy for bf16 logits.
#include "cuda/binary_cross_entropy_launch.cuh"

LTK_BINARY_INSTANCES(BFloat16, float)
