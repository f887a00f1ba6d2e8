// The kernels of distillation for f16 logits of the student.
#include "cuda/distillation_launch.cuh"

LTK_DISTILLATION_INSTANCES(Float16, float)
