// Which sample a position of the stream is: a pure function of (seed, epoch, position). Integers only, so that every
// device computes the same bits. Torch-free, for host and device; ltkernels/reference/sampling.py is the definition.
#pragma once

#include <cstdint>

#include "common/permutation.h"
#include "common/philox.h"

namespace ltk {

// A slot of a round in which classes have different numbers of draws. The slots of a window hold different classes, so
// that shuffling within windows keeps the order of a class's draws.
struct Slot {
  int32_t window_start, window_size;
  int32_t klass;
  int32_t ordinal;  // the draws of its class in the slots before
};

// One call: out[i] is the sample at position start + i * step.
struct SamplingCall {
  // Class c has the members [offsets[c], offsets[c + 1]). Null: every member is a class of its own.
  const int64_t* offsets;
  // The samples in the order of their classes. Both null: member m is sample m.
  const int32_t* members32;
  const int64_t* members64;
  int64_t classes;

  // Classes that are drawn: the alias table, or null where all classes have the same probability. An entry has a
  // threshold in its low and an alias in its high 32 bits.
  const uint64_t* alias_table;

  // Classes that are dealt in rounds, without replacement.
  bool dealt;
  int64_t groups;         // a round; of `draws` positions each
  int64_t draws;          // of a class one after the other
  bool distinct;          // no member twice in a group, where its class has enough
  const Slot* slots;      // [groups], or null: every class once a round, or `groups` of them
  const int32_t* quotas;  // [classes] slots of a class, with `slots`

  int64_t start, step, count;
  const int64_t* start_at;  // on a device: added to start, and the epoch, if not null
  const int64_t* epoch_at;
  uint32_t epoch;
  uint64_t seed;
  int64_t* out;
};

// Where the members of a class stand, and how many they are.
struct Members {
  int64_t first, count;
};

LTK_HOST_DEVICE Members members_of(const SamplingCall& call, int64_t klass) {
  if (!call.offsets) return {klass, 1};
  const int64_t first = call.offsets[klass];
  return {first, call.offsets[klass + 1] - first};
}

// With replacement: word 0 and 1 are a fraction of 64 bits, whose product with C has the column of the alias table in
// front of the point and, behind it, what is compared with the column's threshold. Words 2 and 3 are the member's.
LTK_HOST_DEVICE int64_t drawn(const SamplingCall& call, int64_t position, uint32_t epoch) {
  const PhiloxBlock random = philox(uint64_t(position), epoch, Stream::draws, call.seed);
  const uint64_t classes = uint64_t(call.classes);
  const uint64_t point = random.words[0] * classes + (random.words[1] * classes >> 32);
  uint64_t klass = point >> 32;
  if (call.alias_table) {
    const uint64_t entry = call.alias_table[klass];
    if (uint32_t(point) >= uint32_t(entry)) klass = entry >> 32;
  }
  const uint64_t fraction = uint64_t(random.words[3]) << 32 | random.words[2];
  const Members members = members_of(call, int64_t(klass));
  return members.count > 0 ? members.first + int64_t(multiply_high(fraction, uint64_t(members.count))) : -1;
}

// Without replacement: classes are dealt in rounds, members in cycles through a permutation of the class.
LTK_HOST_DEVICE int64_t dealt(const SamplingCall& call, int64_t position, uint32_t epoch) {
  const int64_t group = position / call.draws, draw = position % call.draws;
  const int64_t round = group / call.groups, place = group % call.groups;
  const int64_t start = call.slots ? call.slots[place].window_start : 0;
  const int64_t size = call.slots ? call.slots[place].window_size : call.classes;
  const PhiloxBlock order = philox(uint64_t(round * call.groups + start), epoch, Stream::class_orders, call.seed);
  const int64_t at = start + permuted(place - start, size, order);
  int64_t klass = at, turn = round;
  if (call.slots) {
    klass = call.slots[at].klass;
    turn = round * call.quotas[klass] + call.slots[at].ordinal;
  }
  const Members members = members_of(call, klass);
  if (members.count <= 0) return -1;
  const int64_t ordinal = turn * call.draws + draw;
  // A cycle is all members, or, with `distinct`, as many as fill groups.
  const int64_t length =
      call.distinct && members.count >= call.draws ? members.count - members.count % call.draws : members.count;
  const int64_t cycle = ordinal / length;
  const PhiloxBlock way = philox(uint64_t(klass) << 32 | uint32_t(cycle), epoch, Stream::member_orders, call.seed);
  return members.first + permuted(ordinal % length, members.count, way);
}

// Where in the samples, in the order of their classes, a position is; -1 where a class came that has no member, which
// only a call that nobody checked can have.
LTK_HOST_DEVICE int64_t place_at(const SamplingCall& call, int64_t position, uint32_t epoch) {
  return call.dealt ? dealt(call, position, epoch) : drawn(call, position, epoch);
}

LTK_HOST_DEVICE int64_t sample_at(const SamplingCall& call, int64_t position, uint32_t epoch) {
  const int64_t place = place_at(call, position, epoch);
  if (!call.members32 && !call.members64) return place;
  const int64_t some = place < 0 ? 0 : place;  // a read that can be under way beside that of another position
  const int64_t sample = call.members32 ? call.members32[some] : call.members64[some];
  return place < 0 ? -1 : sample;
}

}  // namespace ltk
