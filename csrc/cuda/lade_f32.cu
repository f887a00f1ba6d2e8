// The kernels of LADE for f32 logits.
#include "cuda/lade_launch.cuh"

LTK_LADE_INSTANCES(float, float)
