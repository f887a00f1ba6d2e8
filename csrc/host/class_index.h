// A stable counting sort of samples by their class, on several threads.
#pragma once

#include <cstdint>

#include "host/integers.h"

namespace ltk {

// Members of an index: all positions of `labels`, or those in `indices` (null: all).
struct LabelledSamples {
  Integers labels;
  const Integers* indices;
  int64_t size() const { return indices ? indices->size : labels.size; }
};

struct Scan {
  int64_t wrong;    // the first position whose value is not in [0, limit), or -1
  int64_t largest;  // if none is wrong
};

// Looks at all labels of members.
Scan scan(const LabelledSamples& samples, int64_t limit, int threads);

enum class Sorted { done, wrong_label, changed_meanwhile };

// Fills offsets [classes + 1], classes < 2^32, and members [size]. `wrong` is the first member whose label is not in
// [0, classes), if there is one. One thread has the first members, the next the following ones: in each class they keep
// their order.
template <class Member>
Sorted sort_by_class(const LabelledSamples& samples, int64_t classes, int64_t* offsets, Member* members, int threads,
                     int64_t* wrong);

}  // namespace ltk
