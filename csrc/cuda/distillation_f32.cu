// The kernels of distillation for f32 logits of the student.
#include "cuda/distillation_launch.cuh"

LTK_DISTILLATION_INSTANCES(float, float)
