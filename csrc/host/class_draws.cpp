#include "host/class_draws.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace ltk {

void alias_entries(const int64_t* masses, int64_t classes, int64_t* entries) {
  constexpr int64_t one = int64_t(1) << 32;
  for (int64_t c = 0; c < classes; ++c) entries[c] = c << 32;  // a full column: all of it is the alias, itself
  const auto next_large = [&](int64_t c) {
    return std::find_if(masses + c, masses + classes, [](int64_t mass) { return mass >= one; }) - masses;
  };
  int64_t giver = next_large(0), left = masses[giver];
  for (int64_t c = 0; c < classes; ++c) {
    if (masses[c] >= one) continue;
    entries[c] = giver << 32 | masses[c];
    left -= one - masses[c];
    while (left < one) {  // the giver is small now; the sum of all says that there is another large class
      const int64_t next = next_large(giver + 1);
      entries[giver] = next << 32 | left;
      left += masses[next] - one;
      giver = next;
    }
  }
}

void fill_slots(const int64_t* quotas, int64_t classes, int64_t groups, Slot* slots) {
  struct Event {
    double time;
    int32_t klass, ordinal;
    bool operator<(const Event& other) const {
      return time != other.time     ? time < other.time
             : klass != other.klass ? klass < other.klass
                                    : ordinal < other.ordinal;
    }
  };
  const auto for_events = [&](const auto& visit) {
    for (int64_t c = 0; c < classes; ++c) {
      const double phase = double(uint32_t(c) * 0x9E3779B9u) * 0x1p-32, quota = double(quotas[c]);
      for (int64_t i = 0; i < quotas[c]; ++i) {
        const double time = (double(i) + phase) / quota;
        visit(std::min(int64_t(time * double(groups)), groups - 1), Event{time, int32_t(c), int32_t(i)});
      }
    }
  };
  // As many buckets of time as events: hardly any has more than a few.
  std::vector<int32_t> ends(groups, 0);
  std::vector<Event> events(groups);
  for_events([&](int64_t bucket, const Event&) { ++ends[bucket]; });
  int32_t begin = 0;
  for (int32_t& end : ends) begin += std::exchange(end, begin);
  for_events([&](int64_t bucket, const Event& event) { events[ends[bucket]++] = event; });
  begin = 0;
  for (const int32_t end : ends) {
    if (end - begin > 1) std::sort(events.begin() + begin, events.begin() + end);
    begin = end;
  }

  std::vector<int32_t> latest(classes, -1);
  int32_t start = 0;
  const auto close = [&](int32_t end) {
    for (int32_t at = start; at < end; ++at) slots[at].window_start = start, slots[at].window_size = end - start;
    start = end;
  };
  for (int32_t at = 0; at < groups; ++at) {
    const Event& event = events[at];
    if (latest[event.klass] >= start) close(at);
    latest[event.klass] = at;
    slots[at].klass = event.klass;
    slots[at].ordinal = event.ordinal;
  }
  close(int32_t(groups));
}

}  // namespace ltk
