// The kernels of the mean of experts for bf16 logits.
#include "cuda/aggregate_experts_launch.cuh"

LTK_AGGREGATE_EXPERTS_INSTANCES(BFloat16, float)
