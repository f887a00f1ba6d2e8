#include "host/class_index.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "host/threads.h"

namespace ltk {
namespace {

// Where the share of thread t of T begins.
int64_t share(int64_t size, int t, int threads) { return int64_t((__int128)size * t / threads); }

// Calls block(first, count, labels, positions) for the members [from, to), in order; positions are null if the members
// are all samples. Stops when it returns false.
template <class Label, class Block>
void for_blocks(const LabelledSamples& samples, int64_t from, int64_t to, const Block& block) {
  Label labels[block_size];
  uint64_t positions[block_size];
  const uint64_t* at = samples.indices ? positions : nullptr;
  for (int64_t first = from; first < to; first += block_size) {
    const int64_t count = std::min(block_size, to - first);
    if (at) {
      read_block(*samples.indices, first, nullptr, count, positions);
      // They were looked at before; but who shares their memory may have changed them.
      for (int64_t i = 0; i < count; ++i) positions[i] = std::min(positions[i], uint64_t(samples.labels.size - 1));
    }
    read_block(samples.labels, first, at, count, labels);
    if (!block(first, count, labels, at)) return;
  }
}

// The first of `count` labels that is not below the limit, or count.
template <class Label>
int64_t first_wrong(const Label* labels, int64_t count, Label limit) {
  Label wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= Label(labels[i] >= limit);
  return wrong ? std::find_if(labels, labels + count, [&](Label label) { return label >= limit; }) - labels : count;
}

int64_t first_of(const std::vector<int64_t>& wrong) {
  const auto found = std::find_if(wrong.begin(), wrong.end(), [](int64_t position) { return position >= 0; });
  return found == wrong.end() ? -1 : *found;
}

int fewer_threads(int threads, int64_t size, int64_t least) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, size / least)));
}

template <class Label>
Scan scan_as(const LabelledSamples& samples, Label limit, int threads) {
  const int64_t size = samples.size();
  threads = fewer_threads(threads, size, 16 * block_size);
  std::vector<int64_t> wrong(threads, -1);
  std::vector<Label> largest(threads, 0);
  on_threads(threads, [&](int t) {
    for_blocks<Label>(samples, share(size, t, threads), share(size, t + 1, threads),
                      [&](int64_t first, int64_t count, const Label* labels, const uint64_t*) {
                        const int64_t right = first_wrong(labels, count, limit);
                        if (right < count) return wrong[t] = first + right, false;
                        Label most = largest[t];
                        for (int64_t i = 0; i < count; ++i) most = std::max(most, labels[i]);
                        return largest[t] = most, true;
                      });
  });
  return {first_of(wrong), int64_t(*std::max_element(largest.begin(), largest.end()))};
}

}  // namespace

Scan scan(const LabelledSamples& samples, int64_t limit, int threads) {
  return limit <= int64_t(UINT32_MAX) ? scan_as<uint32_t>(samples, uint32_t(limit), threads)
                                      : scan_as<uint64_t>(samples, uint64_t(limit), threads);
}

template <class Member>
Sorted sort_by_class(const LabelledSamples& samples, int64_t classes, int64_t* offsets, Member* members, int threads,
                     int64_t* wrong_member) {
  using Cursor = std::make_unsigned_t<Member>;
  const int64_t size = samples.size();
  constexpr Cursor line = 64 / sizeof(Member);
  // The threads' counts are no more than an eighth of the members.
  threads = fewer_threads(threads, size, std::max<int64_t>(16 * block_size, 8 * classes));
  std::vector<Cursor> cursors(size_t(threads) * classes);
  std::vector<int64_t> wrong(threads, -1);
  on_threads(threads, [&](int t) {
    Cursor* counts = cursors.data() + t * classes;
    for_blocks<uint32_t>(samples, share(size, t, threads), share(size, t + 1, threads),
                         [&](int64_t first, int64_t count, const uint32_t* labels, const uint64_t*) {
                           const int64_t right = first_wrong(labels, count, uint32_t(classes));
                           if (right < count) return wrong[t] = first + right, false;
                           for (int64_t i = 0; i < count; ++i) ++counts[labels[i]];
                           return true;
                         });
  });
  *wrong_member = first_of(wrong);
  if (*wrong_member >= 0) return Sorted::wrong_label;

  int64_t total = 0;
  for (int64_t c = 0; c < classes; ++c) {
    offsets[c] = total;
    for (int t = 0; t < threads; ++t) {
      const int64_t count = cursors[t * classes + c];
      cursors[t * classes + c] = Cursor(total);
      total += count;
    }
  }
  offsets[classes] = total;

  std::vector<char> changed(threads, false);
  on_threads(threads, [&](int t) {
    Cursor* cursor = cursors.data() + t * classes;
    for_blocks<uint32_t>(samples, share(size, t, threads), share(size, t + 1, threads),
                         [&](int64_t first, int64_t count, const uint32_t* labels, const uint64_t* positions) {
                           for (int64_t i = 0; i < count; ++i) {
                             if (labels[i] >= uint32_t(classes)) return changed[t] = true, false;
                             const Cursor at = cursor[labels[i]]++;
                             if (at >= Cursor(size)) return changed[t] = true, false;
                             // A class's next line, asked for a line early: it will hardly be in the cache by itself.
                             if (at % line == 0) __builtin_prefetch(members + at + line, 1);
                             members[at] = Member(positions ? positions[i] : uint64_t(first + i));
                           }
                           return true;
                         });
  });
  // The last thread's cursors are now where the next classes begin, if nobody wrote into the labels meanwhile.
  bool as_counted = std::none_of(changed.begin(), changed.end(), [](char c) { return c; });
  const Cursor* last = cursors.data() + (threads - 1) * classes;
  for (int64_t c = 0; c < classes; ++c) as_counted &= last[c] == Cursor(offsets[c + 1]);
  return as_counted ? Sorted::done : Sorted::changed_meanwhile;
}

template Sorted sort_by_class(const LabelledSamples&, int64_t, int64_t*, int32_t*, int, int64_t*);
template Sorted sort_by_class(const LabelledSamples&, int64_t, int64_t*, int64_t*, int, int64_t*);

}  // namespace ltk
