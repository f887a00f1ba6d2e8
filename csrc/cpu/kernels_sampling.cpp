// Indices of the stream, compiled once per instruction set.
//
// A call goes through its positions in blocks. Places (where in `members` an index stands) are computed into the memory
// of the result and prefetched, while the block before, whose members have come meanwhile, is read: the gather waits
// for memory, and the computation of places has its time.
#include <algorithm>

#include "cpu/philox_simd.h"
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

inline bool drawn_one_by_one(const SamplingCall& call, int64_t begin, int64_t end) {
  bool good = true;
  for (int64_t i = begin; i < end; ++i) {
    const Member member = drawn(call, call.start + i * call.step, call.epoch);
    good &= class_size(call, member.klass) > 0;
    call.out[i] = call.offsets ? call.offsets[member.klass] + member.at : member.klass;
  }
  prefetch(call, begin, end);
  return good;
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
    return drawn_one_by_one(call_, i, end) && good;
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

// Positions one after the other, in three digits: round, place in the round, draw in the group. Adding the step's
// digits takes no division.
class Dealer {
 public:
  Dealer(const SamplingCall& call, int64_t first) : call_(call) {
    split(call.start + first * call.step, at_);
    split(call.step, step_);
  }

  // The place of the next position; -1 if its class has no members.
  int64_t next() {
    const Digits at = at_;
    advance();
    const Slot* slots = call_.slots;
    const int64_t start = slots ? slots[at.place].window_start : 0;
    const int64_t size = slots ? slots[at.place].window_size : call_.classes;
    const PhiloxBlock& order = order_.block(uint64_t(at.round * call_.groups + start), Stream::class_orders, call_);
    const int64_t found = start + permuted(at.place - start, size, order);
    const int64_t klass = slots ? slots[found].klass : found;
    const int64_t turn = slots ? at.round * call_.quotas[klass] + slots[found].ordinal : at.round;
    const int64_t members = class_size(call_, klass);
    if (members <= 0) return -1;
    const int64_t ordinal = turn * call_.draws + at.draw;
    const int64_t length = call_.distinct && members >= call_.draws ? members - members % call_.draws : members;
    const int64_t cycle = ordinal < length ? 0 : ordinal / length;
    const uint64_t name = uint64_t(klass) << 32 | uint32_t(cycle);
    const int64_t member = permuted(ordinal - cycle * length, members, way_.block(name, Stream::member_orders, call_));
    return call_.offsets ? call_.offsets[klass] + member : klass;
  }

 private:
  struct Digits {
    int64_t round, place, draw;
  };
  // The last block of a stream: positions of one window, or one group, follow each other.
  class Cached {
   public:
    const PhiloxBlock& block(uint64_t position, Stream stream, const SamplingCall& call) {
      if (!known_ || position != position_) block_ = philox(position, call.epoch, stream, call.seed);
      known_ = true;
      position_ = position;
      return block_;
    }

   private:
    bool known_ = false;
    uint64_t position_ = 0;
    PhiloxBlock block_{};
  };

  void split(int64_t position, Digits& to) const {
    const int64_t group = position / call_.draws;
    to = {group / call_.groups, group % call_.groups, position % call_.draws};
  }
  void advance() {
    at_.draw += step_.draw;
    at_.place += step_.place;
    at_.round = int64_t(uint64_t(at_.round) + uint64_t(step_.round));  // beyond the last position it may overflow
    if (at_.draw >= call_.draws) at_.draw -= call_.draws, ++at_.place;
    if (at_.place >= call_.groups) at_.place -= call_.groups, ++at_.round;
  }

  const SamplingCall& call_;
  Digits at_, step_;
  Cached order_, way_;
};

bool sample(const SamplingCall& call, int64_t begin, int64_t end) {
  if (begin >= end) return true;
  if (call.dealt) {
    Dealer dealer(call, begin);
    return in_blocks(call, begin, end, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        if ((call.out[i] = dealer.next()) < 0) return false;
      prefetch(call, from, to);
      return true;
    });
  }
#if defined(__AVX2__)
  if (!call.offsets || call.offsets[call.classes] >> 32 == 0)
    return in_blocks(call, begin, end, DrawnVectors(call, begin));
#endif
  return in_blocks(call, begin, end, [&](int64_t from, int64_t to) { return drawn_one_by_one(call, from, to); });
}

}  // namespace

extern const SamplingTable sampling_table;
const SamplingTable sampling_table = {sample};

}  // namespace ltk::LTK_ISA
