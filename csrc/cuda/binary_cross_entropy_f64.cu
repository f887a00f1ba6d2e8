// The kernels of binary_cross_entropy for f64 logits.
#include "cuda/binary_cross_entropy_launch.cuh"

LTK_BINARY_INSTANCES(double, double)
