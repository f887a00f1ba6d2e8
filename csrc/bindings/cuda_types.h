// The types that kernels on a GPU are compiled for.
#pragma once

#include "bindings/tensors.h"

namespace ltk::cuda {
struct BFloat16;
struct Float16;
}  // namespace ltk::cuda

namespace ltk::bindings {

// run(E*, T{}) with the types that the logits have and that are computed with.
template <class Run>
auto with_types(const Tensor& input, Run run) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return run(static_cast<double*>(nullptr), double{});
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr), float{});
    case ScalarType::BFloat16:
      return run(static_cast<cuda::BFloat16*>(nullptr), float{});
    case ScalarType::Half:
      return run(static_cast<cuda::Float16*>(nullptr), float{});
    default:
      fail("expected floating logits");
  }
}

}  // namespace ltk::bindings
