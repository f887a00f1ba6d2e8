// The kernels of several experts' losses for f16 logits.
#include "cuda/expert_cross_entropy_launch.cuh"

LTK_EXPERT_CROSS_ENTROPY_INSTANCES(Float16, float)
