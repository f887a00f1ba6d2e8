// Entries of ltkernels._host for what samplers draw from.
#pragma once

#include <pybind11/pybind11.h>

namespace ltk {

void bind_sampling(pybind11::module_& m);

}  // namespace ltk
