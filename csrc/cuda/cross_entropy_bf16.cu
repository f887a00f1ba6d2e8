// The kernels of cross_entropy for bf16 logits.
#include "cuda/cross_entropy_instances.cuh"

LTK_CROSS_ENTROPY_INSTANCES(BFloat16, float)
