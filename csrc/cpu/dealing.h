// Places of positions that are dealt (`dealt` of common/sampling.h), some vectors at a time.
// Included by the kernels_*.cpp files only, which are compiled once per instruction set.
#pragma once

#include "common/sampling.h"
#include "cpu/permutation_simd.h"

#if defined(__AVX2__)
namespace ltk::LTK_ISA {

// A position as digits: round, place in the round, draw in the group. Adding the step's digits takes no division.
struct Digits {
  int64_t round, place, draw;
};

class DigitCounter {
 public:
  LTK_INLINE DigitCounter(const SamplingCall& call, int64_t first) : groups_(call.groups), draws_(call.draws) {
    at_ = split(call.start + first * call.step);
    step_ = split(call.step);
  }

  LTK_INLINE Digits next() {
    const Digits at = at_;
    at_.draw += step_.draw;
    at_.place += step_.place;
    at_.round = int64_t(uint64_t(at_.round) + uint64_t(step_.round));  // beyond the last position it may overflow
    if (at_.draw >= draws_) at_.draw -= draws_, ++at_.place;
    if (at_.place >= groups_) at_.place -= groups_, ++at_.round;
    return at;
  }

 private:
  LTK_INLINE Digits split(int64_t position) const {
    const int64_t group = position / draws_;
    return {group / groups_, group % groups_, position % draws_};
  }

  int64_t groups_, draws_;
  Digits at_, step_;
};

// A draw of a class as what its permutation is asked for.
struct Turn {
  int64_t first, members;  // of the class
  int64_t cycle, at;       // which time through its members, and how far
};

LTK_INLINE Turn turn_of(const SamplingCall& call, int64_t klass, int64_t ordinal) {
  const auto [first, members] = members_of(call, klass);
  const int64_t length = call.distinct && members >= call.draws ? members - members % call.draws : members;
  const int64_t cycle = ordinal < length || length <= 0 ? 0 : ordinal / length;
  return {first, members, cycle, ordinal - cycle * length};
}

class DealtVectors {
 public:
  static constexpr int vectors = 2;  // whose permutations take turns: one waits for each of its multiplications
  static constexpr int64_t positions = vectors * word_lanes;

  DealtVectors(const SamplingCall& call, int64_t first) : call_(call), digits_(call, first), keys_(call.seed) {}

  // The places of the next positions; false if a class without members came.
  LTK_INLINE bool next(int64_t* places) {
    constexpr int n = vectors;
    const Words low = every(0xFFFFFFFFu);
    Words round[n], draw[n], window[n], start[n], size[n], klass[n];
    for (int k = 0; k < n; ++k) {
      for (int64_t lane = 0; lane < word_lanes; ++lane) {
        const Digits at = digits_.next();
        round[k][lane] = uint64_t(at.round), draw[k][lane] = uint64_t(at.draw), klass[k][lane] = uint64_t(at.place);
        window[k][lane] = uint64_t(at.round * call_.groups);
      }
      start[k] = Words{}, size[k] = every(uint64_t(call_.classes));
      if (call_.slots) {
        const Words entry = gather(call_.slots, klass[k] << 1);
        start[k] = entry & low, size[k] = entry >> 32;
      }
      window[k] += start[k];
      klass[k] -= start[k];
    }
    WordBlocks keys[n];
    blocks(keys, window, Stream::class_orders);
    permute(klass, size, keys);
    bool good = true;
    Words first[n], members[n], way[n], member[n];
    for (int k = 0; k < n; ++k) {
      klass[k] += start[k];
      Words ordinal{};
      if (call_.slots) {
        const Words entry = gather(&call_.slots->klass, klass[k] << 1);
        klass[k] = entry & low;
        ordinal = entry >> 32;
      }
      for (int64_t lane = 0; lane < word_lanes; ++lane) {
        const uint64_t c = klass[k][lane];
        const uint64_t turn = call_.slots ? round[k][lane] * uint64_t(call_.quotas[c]) + ordinal[lane] : round[k][lane];
        const Turn of = turn_of(call_, int64_t(c), int64_t(turn * uint64_t(call_.draws) + draw[k][lane]));
        good &= of.members > 0;
        first[k][lane] = uint64_t(of.first), members[k][lane] = uint64_t(of.members);
        way[k][lane] = c << 32 | uint32_t(of.cycle), member[k][lane] = uint64_t(of.at);
      }
    }
    if (!good) return false;
    blocks(keys, way, Stream::member_orders);
    permute(member, members, keys);
    for (int k = 0; k < n; ++k) {
      member[k] += first[k];
      std::memcpy(places + k * word_lanes, &member[k], sizeof member[k]);
    }
    return true;
  }

 private:
  LTK_INLINE void blocks(WordBlocks (&to)[vectors], const Words (&position)[vectors], Stream stream) const {
    Words c0[vectors], c1[vectors], c2[vectors], c3[vectors];
    for (int k = 0; k < vectors; ++k)
      c0[k] = position[k], c1[k] = position[k] >> 32, c2[k] = every(call_.epoch), c3[k] = every(stream);
    philox(c0, c1, c2, c3, keys_);
    for (int k = 0; k < vectors; ++k) to[k] = {{c0[k], c1[k], c2[k], c3[k]}};
  }

  const SamplingCall& call_;
  DigitCounter digits_;
  RoundKeys keys_;
};

}  // namespace ltk::LTK_ISA
#endif
