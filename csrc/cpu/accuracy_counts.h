// What the torch-free CPU core of accuracy_counts is asked to do.
#pragma once

#include <cstdint>

#include "common/accuracy_counts.h"

namespace ltk {

// Writes to right[begin, end) whether the rows of logits are predicted right: 1 or 0. Of rows whose label is no class
// it writes 0.
struct AccuracyCountsTable {
  void (*mark)(const AccuracyCall&, int64_t begin, int64_t end, uint8_t* right);
};

}  // namespace ltk
