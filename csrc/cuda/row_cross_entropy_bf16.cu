// The kernels of row_cross_entropy for bf16 logits.
#include "cuda/row_cross_entropy_launch.cuh"

LTK_ROW_CROSS_ENTROPY_INSTANCES(BFloat16, float)
