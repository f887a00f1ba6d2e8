// Which kernel serves a call, and on how many threads. Decisions depend on shapes and on the device alone, so a call
// has the same bits every time.
#pragma once

#include <algorithm>

#include "cuda/cross_entropy_any.cuh"
#include "cuda/cross_entropy_vector.cuh"

namespace ltk::cuda {

constexpr int64_t table_bytes = 64 * 1024;  // of a block at most, so that several blocks find room beside each other

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows that the vector kernels serve: labels, classes side by side, an index of 32 bits within the row.
template <class T>
bool has_vectors(const Call<T>& call) {
  return sizeof(T) == 4 && !is_floating(call.target_type) && call.input_layout.stride_class == 1 &&
         call.classes < (int64_t(1) << 31) - 64;
}

// Threads that share a row in the kernels for any layout: one where neighbouring rows are nearer than neighbouring
// classes.
template <class T>
int threads_a_row(const Call<T>& call) {
  if (call.input_layout.stride_class != 1 && call.input_layout.inner > 1 && call.input_layout.stride_inner == 1)
    return 1;
  if (call.input_layout.stride_class != 1 && call.input_layout.inner == 1 && call.input_layout.stride_outer == 1)
    return 1;
  return call.classes <= 1024 ? 32 : 256;
}

// How the kernels for any layout are launched: blocks for all rows, or so many that the device is full `waves` times.
template <class T>
simt::Launch any_launch(const Call<T>& call, const simt::Device& device, int waves, void* stream) {
  const int a_row = threads_a_row(call), threads = any_threads(a_row);
  const int64_t most = int64_t(device.multiprocessors) * (2048 / threads) * waves;
  return {std::max<int64_t>(1, std::min(divide_up(call.rows, threads / a_row), most)),
          1,
          threads,
          1,
          shared_header,
          stream};
}

enum class Kernel { warp, block, cluster, sweep, any };

struct ForwardPlan {
  Kernel kernel;
  int held;     // vectors a thread
  int a_row;    // threads a row, of `any`
  int vectors;  // a block's part of the row
  simt::Launch how;
};

template <class E>
ForwardPlan plan_vectors(const Call<float>& call, const simt::Device& device) {
  // A row may start up to width - 1 elements behind an aligned address; if no row does, it has that many fewer.
  constexpr int n = width<E>;
  const auto aligned = [](int64_t value) { return value % n == 0; };
  const Layout& l = call.input_layout;
  const bool no_shift = reinterpret_cast<uintptr_t>(call.input) % sizeof(Vector) == 0 && aligned(l.stride_outer) &&
                        (l.inner == 1 || aligned(l.stride_inner));
  const int64_t vectors = divide_up(call.classes + (no_shift ? 0 : n - 1), n);
  const int tables = table_count(call);
  const auto shared_bytes = [&](int64_t part) {
    return shared_header + (tables > 0 ? SharedTables<E>::bytes(part, tables) : 0);
  };
  // Blocks enough to fill the device several times over, and no more than that: each then takes many rows with the
  // tables that it fetched once.
  const auto blocks = [&](int64_t wanted, int threads) {
    return std::max<int64_t>(1, std::min(wanted, int64_t(device.multiprocessors) * (2048 / threads) * 2));
  };
  ForwardPlan plan{};
  plan.how = {0, 1, 128, 1, 0, nullptr};
  if (vectors <= 4 * simt::warp_size) {
    plan.kernel = Kernel::warp;
    plan.held = vectors <= simt::warp_size ? 1 : vectors <= 2 * simt::warp_size ? 2 : 4;
    plan.vectors = plan.held * simt::warp_size;
    plan.how.blocks = blocks(divide_up(call.rows, 4), 128);
    plan.how.shared_bytes = shared_bytes(plan.vectors);
    if (plan.how.shared_bytes <= shared_header + table_bytes) return plan;
  }
  // Registers hold the row until its sum is known, and while a block computes it loads nothing: two blocks or more
  // should share a multiprocessor. 4 vectors a thread leave room for that; 8 are for what no cluster can take.
  const auto holds = [&](int held, int cluster) {
    const int threads = int(divide_up(divide_up(vectors, held * cluster), simt::warp_size)) * simt::warp_size;
    if (threads > 512) return false;
    plan.kernel = cluster == 1 ? Kernel::block : Kernel::cluster;
    plan.held = held;
    plan.vectors = held * threads;
    plan.how.threads = threads;
    plan.how.cluster = cluster;
    plan.how.blocks =
        cluster * std::max<int64_t>(1, std::min(call.rows, blocks(call.rows * cluster, threads) / cluster));
    plan.how.shared_bytes = shared_bytes(plan.vectors);
    return plan.how.shared_bytes <= shared_header + table_bytes;
  };
  if (holds(4, 1)) return plan;
  if (device.clusters) {
    for (const int cluster : {2, 4, 8})
      if (holds(4, cluster)) return plan;
    if (holds(8, 8)) return plan;
  } else if (holds(8, 1)) {
    return plan;
  }
  plan.kernel = Kernel::sweep;
  plan.how.threads = 512;
  plan.how.cluster = 1;
  plan.how.blocks = blocks(call.rows, 512);
  plan.how.shared_bytes = shared_header;
  return plan;
}

template <class E, class T>
ForwardPlan plan_forward(const Call<T>& call, const simt::Device& device) {
  if constexpr (sizeof(T) == 4)
    if (has_vectors(call)) return plan_vectors<E>(call, device);
  ForwardPlan plan{};
  plan.kernel = Kernel::any;
  plan.a_row = threads_a_row(call);
  plan.how = any_launch(call, device, 2, nullptr);
  return plan;
}

template <class E, class T>
int64_t forward_partials_of(const Call<T>& call, const char** error) {
  simt::Device device;
  if ((*error = simt::current_device(&device)) != nullptr) return 0;
  return call.reduction == Reduction::none ? 0 : plan_forward<E, T>(call, device).how.blocks;
}

template <class T>
int64_t column_splits_of(const Call<T>& call, const simt::Device& device) {
  const int64_t chunks = column_chunks(call.classes);
  const int64_t wanted = divide_up(int64_t(device.multiprocessors) * 16, chunks);
  return std::max<int64_t>(1, std::min(wanted, divide_up(call.rows, 8)));
}

template <class E>
const char* forward_vectors_of(const Call<float>& call, const ForwardPlan& plan) {
  const VectorCall arguments{call, plan.vectors};
  const bool tables = table_count(call) > 0;
  const auto start = [&](auto plain, auto tabled) {
    return simt::launch(plan.how, tables ? tabled : plain, arguments);
  };
  constexpr Tables none = Tables::none, shared = Tables::shared;
  if (plan.kernel == Kernel::warp && plan.held == 1)
    return start(&forward_vectors<E, none, 1, Group::warp>, &forward_vectors<E, shared, 1, Group::warp>);
  if (plan.kernel == Kernel::warp && plan.held == 2)
    return start(&forward_vectors<E, none, 2, Group::warp>, &forward_vectors<E, shared, 2, Group::warp>);
  if (plan.kernel == Kernel::warp)
    return start(&forward_vectors<E, none, 4, Group::warp>, &forward_vectors<E, shared, 4, Group::warp>);
  if (plan.kernel == Kernel::block && plan.held == 4)
    return start(&forward_vectors<E, none, 4, Group::block>, &forward_vectors<E, shared, 4, Group::block>);
  if (plan.kernel == Kernel::block)
    return start(&forward_vectors<E, none, 8, Group::block>, &forward_vectors<E, shared, 8, Group::block>);
  if (plan.kernel == Kernel::cluster && plan.held == 4)
    return start(&forward_vectors<E, none, 4, Group::cluster>, &forward_vectors<E, shared, 4, Group::cluster>);
  if (plan.kernel == Kernel::cluster)
    return start(&forward_vectors<E, none, 8, Group::cluster>, &forward_vectors<E, shared, 8, Group::cluster>);
  return start(&forward_vectors<E, none, 0, Group::block>, &forward_vectors<E, Tables::global, 0, Group::block>);
}

template <class E, class T>
const char* forward_of(const Call<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  ForwardPlan plan = plan_forward<E, T>(call, device);
  plan.how.stream = stream;
  if constexpr (sizeof(T) == 4)
    if (plan.kernel != Kernel::any) return forward_vectors_of<E>(call, plan);
  if (plan.a_row == 1) return simt::launch(plan.how, &forward_any<E, T, 1>, call);
  if (plan.a_row == 32) return simt::launch(plan.how, &forward_any<E, T, 32>, call);
  return simt::launch(plan.how, &forward_any<E, T, 256>, call);
}

template <class E>
const char* backward_vectors_of(const Call<float>& call, const simt::Device& device, void* stream) {
  constexpr int n = width<E>;
  const int64_t vectors = divide_up(call.classes + n - 1, n);
  const int tables = table_count(call);
  VectorCall arguments{call, 0};
  simt::Launch how{0, 1, 128, 1, shared_header, stream};
  const bool warps = vectors <= backward_held * simt::warp_size;
  if (warps) {
    arguments.vectors = backward_held * simt::warp_size;
    how.blocks = std::min<int64_t>(divide_up(call.rows, 4), int64_t(device.multiprocessors) * 32);
  } else {
    how.threads = 256;
    // Columns are split until the tables fit, and further while there are not two blocks for each multiprocessor.
    const int64_t least = how.threads;
    int64_t part = vectors;
    while (part > least && ((tables > 0 && SharedTables<E>::bytes(part, tables) > table_bytes) ||
                            call.rows * divide_up(vectors, part) < 2 * device.multiprocessors ||
                            divide_up(vectors, part) * backward_held * how.threads < vectors / 4))
      part = divide_up(part, 2);
    part = std::max(part, divide_up(vectors, 65535));  // of the grid's second dimension
    part = divide_up(part, how.threads) * how.threads;
    arguments.vectors = int(part);
    how.tiles = int(divide_up(vectors, part));
    how.blocks =
        std::max<int64_t>(1, std::min<int64_t>(call.rows, divide_up(int64_t(device.multiprocessors) * 16, how.tiles)));
  }
  if (tables > 0) how.shared_bytes += SharedTables<E>::bytes(arguments.vectors, tables);
  if (warps)
    return simt::launch(how,
                        tables > 0 ? &backward_vectors<E, Tables::shared, Group::warp>
                                   : &backward_vectors<E, Tables::none, Group::warp>,
                        arguments);
  return simt::launch(how,
                      tables > 0 ? &backward_vectors<E, Tables::shared, Group::block>
                                 : &backward_vectors<E, Tables::none, Group::block>,
                      arguments);
}

template <class E, class T>
const char* backward_of(const Call<T>& call, void* stream) {
  simt::Device device;
  if (const char* error = simt::current_device(&device)) return error;
  if (call.scale_sums != nullptr || call.bias_sums != nullptr) {
    const int64_t chunks = column_chunks(call.classes);
    const simt::Launch how{column_splits_of(call, device),
                           int(std::min<int64_t>(chunks, 65535)),
                           column_threads,
                           1,
                           shared_header,
                           stream};
    return simt::launch(how, &backward_columns<E, T>, call);
  }
  if (call.rows == 0) return nullptr;
  if constexpr (sizeof(T) == 4)
    if (has_vectors(call) && call.gradient_layout.stride_class == 1)
      return backward_vectors_of<E>(call, device, stream);
  const int a_row = threads_a_row(call);
  const simt::Launch how = any_launch(call, device, 4, stream);
  if (a_row == 1) return simt::launch(how, &backward_any<E, T, 1>, call);
  if (a_row == 32) return simt::launch(how, &backward_any<E, T, 32>, call);
  return simt::launch(how, &backward_any<E, T, 256>, call);
}

}  // namespace ltk::cuda
