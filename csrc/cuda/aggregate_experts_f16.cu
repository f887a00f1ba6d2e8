// The kernels of the mean of experts for f16 logits.
#include "cuda/aggregate_experts_launch.cuh"

LTK_AGGREGATE_EXPERTS_INSTANCES(Float16, float)
