// What ltkernels/class_draws.py makes of probabilities, in the same bits and faster: the definitions are there.
#pragma once

#include <cstdint>

#include "common/sampling.h"

namespace ltk {

// Fills columns of mass 2^32 with masses >= 0 whose sum is classes * 2^32.
void alias_entries(const int64_t* masses, int64_t classes, int64_t* entries);

// Fills the slots of a round, as many as the sum of the quotas, which is less than 2^31.
void fill_slots(const int64_t* quotas, int64_t classes, int64_t groups, Slot* slots);

}  // namespace ltk
