// Entries of ltkernels._host for repeat factors.
#pragma once

#include <pybind11/pybind11.h>

namespace ltk {

void bind_repeats(pybind11::module_& m);

}  // namespace ltk
