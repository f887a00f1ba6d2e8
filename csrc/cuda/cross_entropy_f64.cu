// The kernels of cross_entropy for f64 logits.
#include "cuda/cross_entropy_instances.cuh"

LTK_CROSS_ENTROPY_INSTANCES(double, double)
