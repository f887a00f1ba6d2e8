// The kernels of several experts' losses for bf16 logits.
#include "cuda/expert_cross_entropy_launch.cuh"

LTK_EXPERT_CROSS_ENTROPY_INSTANCES(BFloat16, float)
