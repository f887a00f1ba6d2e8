// The kernels of distillation for bf16 logits of the student.
#include "cuda/distillation_launch.cuh"

LTK_DISTILLATION_INSTANCES(BFloat16, float)
