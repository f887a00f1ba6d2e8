// The kernels of row_cross_entropy for f64 logits.
#include "cuda/row_cross_entropy_launch.cuh"

LTK_ROW_CROSS_ENTROPY_INSTANCES(double, double)
