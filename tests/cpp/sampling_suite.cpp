// sample_indices of one instruction set against common/sampling.h a position at a time, on random calls between pages
// that fault.
#include <algorithm>
#include <memory>
#include <vector>

#include "check.h"
#include "common/sampling.h"
#include "cpu/kernels.h"
#include "suites.h"

namespace test {
namespace {

// Random123's published answers (kat_vectors, philox4x32 10): counter, key, block.
void check_philox() {
  struct Answer {
    uint64_t position;
    uint32_t epoch, stream;
    uint64_t seed;
    uint32_t words[4];
  };
  for (const Answer& known : {
           Answer{0, 0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
           Answer{~0ull, ~0u, ~0u, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
           Answer{0x85a308d3243f6a88,
                  0x13198a2e,
                  0x03707344,
                  0x299f31d0a4093822,
                  {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
       }) {
    const ltk::PhiloxBlock found = ltk::philox(known.position, known.epoch, known.stream, known.seed);
    if (std::memcmp(found.words, known.words, sizeof known.words) != 0) fail("philox of %lx", long(known.position));
  }
}

template <class T>
class Memory {
 public:
  Memory(const std::vector<T>& values, bool at_end) : guarded_(values.size() * sizeof(T), at_end) {
    std::memcpy(guarded_.data(), values.data(), values.size() * sizeof(T));
  }
  T* data() const { return guarded_.as<T>(); }

 private:
  Guarded guarded_;
};

// A round of slots in which no window has a class twice.
struct Round {
  std::vector<ltk::Slot> slots;
  std::vector<int32_t> quotas;
};
Round random_round(Random& random, int64_t classes) {
  Round round{{}, std::vector<int32_t>(classes, 0)};
  for (int64_t window = 1 + random.below(4); window > 0; --window) {
    std::vector<int32_t> order(classes);
    for (int64_t c = 0; c < classes; ++c) order[c] = int32_t(c);
    for (int64_t c = classes - 1; c > 0; --c) std::swap(order[c], order[random.below(c + 1)]);
    const int32_t start = int32_t(round.slots.size()), size = int32_t(1 + random.below(classes));
    for (int32_t k = 0; k < size; ++k) round.slots.push_back({start, size, order[k], round.quotas[order[k]]++});
  }
  return round;
}

void check_call(uint64_t seed) {
  Random random(seed);
  const int64_t classes = 1 + random.below(random.chance(0.5) ? 6 : 90);
  const bool singletons = random.chance(0.2), identity = random.chance(0.2), at_end = random.chance(0.7);
  std::vector<int64_t> offsets(classes + 1, 0);
  // Empty classes come last, where a member read for one would lie beyond the end.
  const bool with_empty = !singletons && random.chance(0.1);
  const int64_t largest = random.chance(0.1) && identity ? int64_t(1) << 40 : 60;
  for (int64_t c = 0; c < classes; ++c)
    offsets[c + 1] = offsets[c] + (with_empty && c == classes - 1 ? 0 : 1 + random.below(largest));
  const int64_t members = singletons ? classes : offsets[classes];
  std::vector<int32_t> narrow(identity ? 0 : members);
  std::vector<int64_t> wide(identity ? 0 : members);
  for (size_t m = 0; m < wide.size(); ++m) wide[m] = narrow[m] = int32_t(random.next() >> 33);
  std::vector<uint64_t> aliases(classes);
  for (uint64_t& entry : aliases) entry = (random.next() & 0xffffffffu) | uint64_t(random.below(classes)) << 32;

  ltk::SamplingCall call{};
  call.classes = classes;
  call.count = random.below(random.chance(0.5) ? 40 : 700);
  call.step = random.chance(0.5) ? 1 : 1 + random.below(random.chance(0.5) ? 9 : int64_t(1) << 33);
  call.start = random.chance(0.3)   ? 0
               : random.chance(0.3) ? (int64_t(1) << 32) - 20
               : random.chance(0.3) ? INT64_MAX - std::max<int64_t>(0, call.count - 1) * call.step
                                    : int64_t(random.next() >> 20);
  call.seed = random.next();
  call.epoch = uint32_t(random.next());
  call.dealt = random.chance(0.4);
  const Round round = random_round(random, classes);
  const bool slots = call.dealt && random.chance(0.5);
  const Memory<int64_t> offset_memory(offsets, at_end), wide_memory(wide, at_end);
  const Memory<int32_t> narrow_memory(narrow, at_end), quotas(round.quotas, at_end);
  const Memory<uint64_t> table(aliases, at_end);
  const Memory<ltk::Slot> slot_memory(round.slots, at_end);
  if (!singletons) call.offsets = offset_memory.data();
  if (!identity && random.chance(0.5))
    call.members32 = narrow_memory.data();
  else if (!identity)
    call.members64 = wide_memory.data();
  if (call.dealt) {
    call.groups = slots ? int64_t(round.slots.size()) : 1 + random.below(classes);
    call.draws = 1 + random.below(4);
    call.distinct = random.chance(0.5);
    if (slots) call.slots = slot_memory.data(), call.quotas = quotas.data();
  } else if (random.chance(0.6)) {
    call.alias_table = table.data();
  }
  const Guarded out(call.count * sizeof(int64_t), true);
  call.out = out.as<int64_t>();

  const auto kernel = ltk::kernels().sampling.sample;
  const int64_t cut = random.below(call.count + 1);  // as two threads would
  bool good = kernel(call, cut, call.count);
  good = kernel(call, 0, cut) && good;
  if (!good && !with_empty) fail("seed %lu: no class is without members", seed);
  if (call.dealt && !good) return;
  for (int64_t i = 0; i < call.count && !call.dealt; ++i) {
    if (ltk::place_at(call, call.start + i * call.step, call.epoch) >= 0) continue;
    if (good) fail("seed %lu: a class without members came at %ld", seed, long(i));
    return;
  }
  if (!good) fail("seed %lu: no class without members came", seed);
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t expected = ltk::sample_at(call, call.start + i * call.step, call.epoch);
    if (call.out[i] != expected)
      fail("seed %lu: out[%ld of %ld] is %ld, expected %ld (dealt %d, step %ld)", seed, long(i), long(call.count),
           long(call.out[i]), long(expected), int(call.dealt), long(call.step));
  }
}

}  // namespace

void sampling(uint64_t seed) {
  check_philox();
  for (uint64_t k = 0; k < 4000; ++k) check_call(seed * 1000003 + k);
}

}  // namespace test
