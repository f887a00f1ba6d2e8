// Indices of the stream, compiled once per instruction set.
//
// A call goes through its positions in blocks. Places (where in `members` an index stands) are computed into the memory
// of the result and prefetched, while the block before, whose members have come meanwhile, is read: the gather waits
// for memory, and the computation of places has its time.
#include <algorithm>

#include "cpu/dealing.h"
#include "cpu/sampling.h"

namespace ltk::LTK_ISA {
namespace {

constexpr int64_t block_size = 64;  // few, so that what was prefetched stays in L1 beside the tables

// Fetches the members at places [begin, end) of the result.
LTK_INLINE void prefetch(const SamplingCall& call, int64_t begin, int64_t end) {
  if (call.members32) {
    for (int64_t i = begin; i < end; ++i) __builtin_prefetch(call.members32 + call.out[i]);
  } else if (call.members64) {
    for (int64_t i = begin; i < end; ++i) __builtin_prefetch(call.members64 + call.out[i]);
  }
}

// Puts the members into the result in place of their places.
inline void resolve(const SamplingCall& call, int64_t begin, int64_t end) {
  if (call.members32) {
    for (int64_t i = begin; i < end; ++i) call.out[i] = call.members32[call.out[i]];
  } else if (call.members64) {
    for (int64_t i = begin; i < end; ++i) call.out[i] = call.members64[call.out[i]];
  }
}

// places(begin, end) writes the places of a block and prefetches them; false if a class without members came.
template <class Places>
LTK_INLINE bool in_blocks(const SamplingCall& call, int64_t begin, int64_t end, Places places) {
  int64_t resolved = begin;
  for (int64_t block = begin; block < end; block += block_size) {
    if (!places(block, std::min(block + block_size, end))) return false;
    resolve(call, resolved, block);
    resolved = block;
  }
  resolve(call, resolved, end);
  return true;
}

inline bool one_by_one(const SamplingCall& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    call.out[i] = place_at(call, call.start + i * call.step, call.epoch);
    if (call.out[i] < 0) return false;
  }
  prefetch(call, begin, end);
  return true;
}

#if defined(__AVX2__)

// For classes of less than 2^32 members. The steps are those of `drawn`.
class DrawnVectors {
 public:
  DrawnVectors(const SamplingCall& call, int64_t first)
      : call_(call),
        first_(first),
        keys_(call.seed),
        classes_(every(uint64_t(call.classes))),
        epoch_(every(call.epoch)) {
    for (int64_t lane = 0; lane < word_lanes; ++lane) lane_steps_[lane] = uint64_t(lane) * uint64_t(call.step);
  }

  bool operator()(int64_t begin, int64_t end) const {
    // Places are read a little later than they are written, or the prefetches would wait for the stores: that took the
    // kernel back to the time of places and gather one after the other.
    constexpr int64_t group = 2 * word_lanes, behind = 2 * group;
    bool good = true;
    int64_t i = begin;
    for (; i + group <= end; i += group) {
      good &= vectors<2>(i);
      if (i - behind >= first_) prefetch(call_, i - behind, i - behind + group);
    }
    for (; i + word_lanes <= end; i += word_lanes) good &= vectors<1>(i);
    return one_by_one(call_, i, end) && good;
  }

 private:
  template <int n>
  LTK_INLINE bool vectors(int64_t i) const {
    Words c0[n], c1[n], c2[n], c3[n];
    for (int k = 0; k < n; ++k) {
      c0[k] = every(uint64_t(call_.start + (i + k * word_lanes) * call_.step)) + lane_steps_;
      c1[k] = c0[k] >> 32;
      c2[k] = epoch_;
      c3[k] = every(Stream::draws);
    }
    philox(c0, c1, c2, c3, keys_);
    bool good = true;
    for (int k = 0; k < n; ++k) {
      const Words point = products(c0[k], classes_) + (products(c1[k], classes_) >> 32);
      Words place = point >> 32;
      if (call_.alias_table) {
        const Words entry = gather(call_.alias_table, place);
        place = (point << 32) >= (entry << 32) ? entry >> 32 : place;
      }
      if (call_.offsets) {
        const Words first = gather(call_.offsets, place);
        const Words size = gather(call_.offsets + 1, place) - first;
        good &= all_positive(size);
        place = first + ((products(c3[k], size) + (products(c2[k], size) >> 32)) >> 32);
      }
      std::memcpy(call_.out + i + k * word_lanes, &place, sizeof place);
    }
    return good;
  }

  static LTK_INLINE bool all_positive(Words size) {
  #if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)size, (__m512i)size) == 0xff;
  #else
    return _mm256_testz_si256((__m256i)(size == 0), (__m256i)(size == 0));
  #endif
  }

  const SamplingCall& call_;
  int64_t first_;  // of the thread's part of the call
  RoundKeys keys_;
  Words classes_, epoch_, lane_steps_;
};

#endif

bool sample(const SamplingCall& call, int64_t begin, int64_t end) {
  if (begin >= end) return true;
#if defined(__AVX2__)
  if (call.dealt) {
    DealtVectors vectors(call, begin);
    return in_blocks(call, begin, end, [&](int64_t from, int64_t to) {
      bool good = true;
      int64_t i = from;
      for (; i + DealtVectors::positions <= to; i += DealtVectors::positions) good &= vectors.next(call.out + i);
      if (!good) return false;
      prefetch(call, from, i);
      return one_by_one(call, i, to);
    });
  }
  if (!call.offsets || call.offsets[call.classes] >> 32 == 0)
    return in_blocks(call, begin, end, DrawnVectors(call, begin));
#endif
  return in_blocks(call, begin, end, [&](int64_t from, int64_t to) { return one_by_one(call, from, to); });
}

}  // namespace

extern const SamplingTable sampling_table;
const SamplingTable sampling_table = {sample};

}  // namespace ltk::LTK_ISA
