// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a block of 128 random bits that is
// a pure function of a counter of 128 bits and a key of 64. Everything random in the project comes from it, with
//   key = seed,    counter = (position, epoch, stream)
// of 64, 32 and 32 bits, so that any number can be computed alone, on any device, in any order.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ltk {

// What a block is for. ltkernels/reference/sampling.py has the same numbers.
enum Stream : uint32_t {
  draws = 0,           // position of an index: its class and its member
  class_orders = 1,    // position of a window of a round: the order of its classes
  member_orders = 2,   // (cycle, class): the order of a class's members
  repeats = 3,         // key of a sample: whether its repeat factor is rounded up
  class_drops = 4,     // four classes of a row: which of them are dropped (row_adjustments.h)
  negative_drops = 5,  // four columns of a row, or a row: which negatives are kept (binary_terms.h)
};

struct PhiloxBlock {
  uint32_t words[4];
};

LTK_HOST_DEVICE PhiloxBlock philox(uint64_t position, uint32_t epoch, uint32_t stream, uint64_t seed) {
  uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = epoch, c3 = stream;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53u) * c0, odd = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(odd >> 32) ^ c1 ^ k0;
    c1 = uint32_t(odd);
    c2 = uint32_t(even >> 32) ^ c3 ^ k1;
    c3 = uint32_t(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace ltk
