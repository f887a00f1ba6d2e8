// What the torch-free CPU core of accuracy_counts is asked to do.
#pragma once

#include <cstdint>

#include "common/accuracy_counts.h"

namespace ltk {

// A call takes three passes over the labels, because one that raises has counted nothing, and one over the logits.
struct AccuracyCountsTable {
  // Whether every label, and every predicted label, is a class or of a row that is ignored.
  bool (*in_range)(const AccuracyCall&);
  // Writes to right[begin, end) whether the rows are predicted right: 1 or 0, 0 for those that do not count.
  void (*mark)(const AccuracyCall&, int64_t begin, int64_t end, uint8_t* right);
  // Adds all rows to their classes.
  void (*add)(const AccuracyCall&, const uint8_t* right);
};

}  // namespace ltk
