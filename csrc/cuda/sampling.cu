// The kernels of sampling: one launch, nothing allocated, each position alone.
//
// A draw is a chain of gathers - alias entry, class offsets, member - of which the last goes to memory. What hides
// their latency is threads, and two positions of each under way: 1,280 threads of a multiprocessor wait for 80 KB, four
// times what the copy bandwidth of an H100 needs. A thread's two indices are one store of 16 bytes. To deal is
// arithmetic: two blocks of random bits and two permutations, whose loops do not overlap. There a thread has one
// position, so that a small batch does not wait for two.
#include <algorithm>

#include "cuda/sampling.h"
#include "cuda/simt.h"

namespace ltk::cuda {

constexpr int threads_a_block = 256, least_threads = 64;

// Epoch and first position of a call, whose parts on the device are read here.
LTK_DEVICE uint32_t epoch_of(const SamplingCall& call) {
  return call.epoch + (call.epoch_at != nullptr ? uint32_t(*call.epoch_at) : 0);
}
LTK_DEVICE uint64_t start_of(const SamplingCall& call) {
  return uint64_t(call.start) + (call.start_at != nullptr ? uint64_t(*call.start_at) : 0);
}

LTK_DEVICE void draw_pairs(SamplingCall call) {
  call.dealt = false;
  call.classes = uint32_t(call.classes);  // known to have no more bits
  const uint64_t start = start_of(call);
  const uint32_t epoch = epoch_of(call);
  const int64_t first = (simt::block() * simt::threads() + simt::thread()) * 2;
  for (int64_t i = first; i < call.count; i += simt::blocks() * simt::threads() * 2) {
    const bool both = i + 1 < call.count;
    const uint64_t position = start + uint64_t(i) * uint64_t(call.step);
    const uint64_t next = both ? position + uint64_t(call.step) : position;  // again: without a branch the two overlap
    const uint64_t a = uint64_t(sample_at(call, int64_t(position), epoch));
    const uint64_t b = uint64_t(sample_at(call, int64_t(next), epoch));
    if (both)
      simt::store16(call.out + i, {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)});
    else
      call.out[i] = int64_t(a);
  }
}

// The usual calls, compiled without the branches of others: classes with int32 members, drawn by an alias table or all
// with the same probability.
template <bool weighted>
LTK_KERNEL(threads_a_block, 5)
draw(const SamplingCall given) {
  SamplingCall call = given;
  LTK_ASSUME(call.offsets != nullptr);
  LTK_ASSUME(call.members32 != nullptr);
  if (!weighted) call.alias_table = nullptr;
  LTK_ASSUME(!weighted || call.alias_table != nullptr);
  draw_pairs(call);
}

LTK_KERNEL(threads_a_block, 5) draw_any(const SamplingCall call) { draw_pairs(call); }

template <bool slots>
LTK_KERNEL(threads_a_block, 6)
deal(const SamplingCall given) {
  SamplingCall call = given;
  call.dealt = true;
  if (!slots) call.slots = nullptr;
  LTK_ASSUME(!slots || call.slots != nullptr);
  const uint64_t start = start_of(call);
  const uint32_t epoch = epoch_of(call);
  const int64_t first = simt::block() * simt::threads() + simt::thread();
  for (int64_t i = first; i < call.count; i += simt::blocks() * simt::threads())
    call.out[i] = sample_at(call, int64_t(start + uint64_t(i) * uint64_t(call.step)), epoch);
}

const char* sample_indices(const SamplingCall& call, void* stream) {
  if (call.count == 0) return nullptr;
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  // A small batch is spread over the multiprocessors, whose gathers meet at each one's cache.
  const int held = call.dealt ? 1 : 2;
  int threads = threads_a_block;
  const auto blocks = [&] { return (call.count - 1) / (threads * held) + 1; };
  while (threads > least_threads && blocks() < device.multiprocessors) threads /= 2;
  const int64_t most = int64_t(device.multiprocessors) * (2048 / threads) * 2;
  const simt::Launch how{std::min(blocks(), most), 1, threads, 1, 0, stream};
  if (call.dealt) return simt::launch(how, call.slots ? &deal<true> : &deal<false>, call);
  if (call.offsets == nullptr || call.members32 == nullptr) return simt::launch(how, &draw_any, call);
  return simt::launch(how, call.alias_table ? &draw<true> : &draw<false>, call);
}

}  // namespace ltk::cuda
