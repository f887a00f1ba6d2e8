// What carries no weight adds nothing.
#pragma once

#include "common/host_device.h"

namespace ltk {

// coefficient * value where a coefficient of zero takes out an infinite value, but not NaN.
template <class T>
LTK_HOST_DEVICE T masked_term(T coefficient, T value) {
  return coefficient == T(0) && value > T(1e30) ? T(0) : coefficient * value;
}

}  // namespace ltk
