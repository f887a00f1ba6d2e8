// The kernels of distillation for f64 logits of the student.
#include "cuda/distillation_launch.cuh"

LTK_DISTILLATION_INSTANCES(double, double)
