// The primitives of simt.h on the CPU: each thread of a block is a fiber, barriers and shuffles switch between them,
// and blocks run one after the other (those of a cluster together). For tests: it shows wrong values, wrong indices and
// barriers that not all threads reach, but no race between warps, since a fiber runs until it waits.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define LTK_ISA emulated
#include "cpu/simd.h"  // the half types' conversions

#define LTK_KERNEL(threads, blocks) inline void
#define LTK_DEVICE inline
#define LTK_ASSUME(condition) ((condition) ? void() : std::abort())

namespace ltk::simt {

constexpr int warp_size = 32;

struct Device {
  int multiprocessors;
  bool clusters;
};

struct Launch {
  int64_t blocks;
  int tiles, threads, cluster;
  int64_t shared_bytes;
  void* stream;
};

// --- Fibers ---

class Barrier {
 public:
  explicit Barrier(int expected) : expected_(expected) {}
  void wait();

 private:
  int expected_, arrived_ = 0;
  int64_t generation_ = 0;
};

struct Warp {
  Barrier barrier{warp_size};
  alignas(8) char values[warp_size][8];
};

struct Cluster;

struct Block {
  int64_t index;
  int rank;
  std::vector<char> shared;
  Barrier barrier;
  std::vector<Warp> warps;
  Cluster* cluster;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  int thread;
  bool done;
};

struct Machine {
  Launch how;
  int tile;
  void (*run)(const void* kernel, const void* arguments);
  const void *kernel, *arguments;
  ucontext_t scheduler;
  Fiber* current;
  int64_t progress;  // counts what fibers do: if a whole round changes nothing, they wait for one another for ever
};

inline thread_local Machine machine;

inline void yield() { swapcontext(&machine.current->context, &machine.scheduler); }

inline void Barrier::wait() {
  const int64_t generation = generation_;
  ++machine.progress;
  if (++arrived_ == expected_) {
    arrived_ = 0;
    ++generation_;
    return;
  }
  while (generation_ == generation) yield();
}

inline void fiber_main() {
  machine.run(machine.kernel, machine.arguments);
  machine.current->done = true;
  ++machine.progress;
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline void start(Fiber* fiber, char* stack, size_t stack_bytes) {
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = stack_bytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, &fiber_main, 0);
}

inline void run_cluster(int64_t first, int size) {
  const Launch& how = machine.how;
  Cluster cluster{{}, Barrier(size * how.threads)};
  constexpr size_t stack_bytes = 64 * 1024;
  const size_t count = size_t(size) * how.threads;
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < count) stacks.emplace_back(new char[stack_bytes]);
  std::vector<Fiber> fibers(count);
  for (int rank = 0; rank < size; ++rank) {
    cluster.blocks.emplace_back(new Block{first + rank, rank, std::vector<char>(how.shared_bytes, char(0xff)),
                                          Barrier(how.threads), std::vector<Warp>(how.threads / warp_size), &cluster});
    for (int thread = 0; thread < how.threads; ++thread) {
      const size_t at = size_t(rank) * how.threads + thread;
      Fiber& fiber = fibers[at];
      fiber.block = cluster.blocks.back().get();
      fiber.thread = thread;
      fiber.done = false;
      start(&fiber, stacks[at].get(), stack_bytes);
    }
  }
  size_t running = count;
  while (running > 0) {
    const int64_t before = machine.progress;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      machine.current = &fiber;
      swapcontext(&machine.scheduler, &fiber.context);
      running -= fiber.done;
    }
    if (machine.progress == before) {
      std::fprintf(stderr, "emulated kernel: a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

// --- The primitives ---

inline Block& here() { return *machine.current->block; }
inline int thread() { return machine.current->thread; }
inline int threads() { return machine.how.threads; }
inline int64_t block() { return here().index; }
inline int64_t blocks() { return machine.how.blocks; }
inline int tile() { return machine.tile; }
inline int tiles() { return machine.how.tiles; }
inline char* shared_memory() { return here().shared.data(); }
inline void sync_block() { here().barrier.wait(); }
inline int cluster_size() { return machine.how.cluster; }
inline int cluster_rank() { return here().rank; }
inline void sync_cluster() { here().cluster->barrier.wait(); }
inline float read_cluster(const float* mine, int rank) {
  const ptrdiff_t at = reinterpret_cast<const char*>(mine) - shared_memory();
  float value;
  std::memcpy(&value, here().cluster->blocks[rank]->shared.data() + at, sizeof value);
  return value;
}

template <class T>
inline T exchange(T value, int lane_mask) {
  Warp& warp = here().warps[thread() / warp_size];
  const int lane = thread() % warp_size;
  std::memcpy(warp.values[lane], &value, sizeof value);
  warp.barrier.wait();
  std::memcpy(&value, warp.values[lane ^ lane_mask], sizeof value);
  warp.barrier.wait();  // before the next exchange writes
  return value;
}

inline void add(int* to, int value) { *to += value; }
inline void add(int64_t* to, int64_t value) { *to += value; }
inline int take_ticket(int* counter) { return (*counter)++; }

inline void store16(void* to, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) std::abort();
  std::memcpy(to, words, 16);
}

inline void prefetch(const void* address) { (void)*static_cast<const volatile char*>(address); }  // faults if wrong

inline float exp2(float x) { return x < -126.0f ? 0.0f : float(std::exp2(double(x))); }
inline double exp2(double x) { return std::exp2(x); }
inline float from_float16(uint16_t bits) { return emulated::to_float(emulated::Float16{bits}); }
inline uint16_t to_float16(float f) {
  emulated::Float16 half;
  emulated::round_to(&half, f);
  return half.bits;
}
inline uint16_t to_bfloat16(float f) {
  emulated::BFloat16 half;
  emulated::round_to(&half, f);
  return half.bits;
}
inline uint32_t to_bfloat16s(float low, float high) { return to_bfloat16(low) | uint32_t(to_bfloat16(high)) << 16; }
inline uint32_t to_float16s(float low, float high) { return to_float16(low) | uint32_t(to_float16(high)) << 16; }

// LTK_EMULATE_MAJOR is the compute capability: 8 is a GPU without clusters. Few multiprocessors, so that blocks take
// several rows.
inline const char* current_device(Device* device) {
  const char* major = std::getenv("LTK_EMULATE_MAJOR");
  *device = {2, major == nullptr || std::atoi(major) >= 9};
  return nullptr;
}

template <class Arguments>
const char* launch(const Launch& how, void (*kernel)(Arguments), const Arguments& arguments) {
  if (how.threads % warp_size != 0 || how.threads > 1024 || how.blocks % how.cluster != 0 ||
      how.shared_bytes > 227 * 1024)
    return "invalid configuration argument";
  machine.how = how;
  machine.run = [](const void* k, const void* a) {
    reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(k))(*static_cast<const Arguments*>(a));
  };
  machine.kernel = reinterpret_cast<const void*>(kernel);
  machine.arguments = &arguments;
  for (machine.tile = 0; machine.tile < how.tiles; ++machine.tile)
    for (int64_t first = 0; first < how.blocks; first += how.cluster) run_cluster(first, how.cluster);
  return nullptr;
}

}  // namespace ltk::simt
