// The kernels of LADE for bf16 logits.
#include "cuda/lade_launch.cuh"

LTK_LADE_INSTANCES(BFloat16, float)
