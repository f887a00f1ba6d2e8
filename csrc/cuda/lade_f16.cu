// The kernels of LADE for f16 logits.
#include "cuda/lade_launch.cuh"

LTK_LADE_INSTANCES(Float16, float)
