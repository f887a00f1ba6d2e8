// The torch-free CPU core of sample_indices.
#pragma once

#include <cstdint>

#include "common/sampling.h"

namespace ltk {

// Fills call.out[begin, end) for a call whose start_at and epoch_at are added already. Members, offsets, the alias
// table and slots are trusted to fit together, but for one thing that is theirs to have: a class without members. False
// if one came, and nothing was read for it.
struct SamplingTable {
  bool (*sample)(const SamplingCall&, int64_t begin, int64_t end);
};

}  // namespace ltk
