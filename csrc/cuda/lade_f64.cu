// The kernels of LADE for f64 logits.
#include "cuda/lade_launch.cuh"

LTK_LADE_INSTANCES(double, double)
