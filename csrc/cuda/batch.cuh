// From rows to the batch: sums over the threads that share a row, and over all blocks in one launch.
#pragma once

#include <cmath>

#include "cuda/cross_entropy.h"
#include "cuda/elements.cuh"
#include "cuda/simt.h"

namespace ltk::cuda {

// Who shares a row: the 32 threads of a warp, a block, or a cluster of blocks.
enum class Group { warp, block, cluster };

// The beginning of a block's shared memory.
struct Shared {
  float maxima[32], sums[2][32];  // of each warp
  float cluster_maximum, cluster_sums[2];
  int last;
  double totals[2][32], row[32];
};
constexpr int64_t shared_header = (sizeof(Shared) + 15) / 16 * 16;

LTK_DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(simt::shared_memory()); }
LTK_DEVICE int lane() { return simt::thread() % simt::warp_size; }
LTK_DEVICE int warp() { return simt::thread() / simt::warp_size; }
LTK_DEVICE int warps() { return simt::threads() / simt::warp_size; }

// A maximum and a sum are taken in turns: who writes the one has seen all read the other, and a barrier between them is
// enough to use their memory again for the next row.
template <Group group>
LTK_DEVICE float group_max(float value) {
  value = simt::warp_max(value);
  if (group == Group::warp) return value;
  Shared& s = shared();
  if (lane() == 0) s.maxima[warp()] = value;
  simt::sync_block();
  value = simt::warp_max(lane() < warps() ? s.maxima[lane()] : -INFINITY);
  if (group == Group::block) return value;
  if (simt::thread() == 0) s.cluster_maximum = value;
  simt::sync_cluster();
  // A lane reads a block each: the latencies of the network between them come once, not one after the other.
  return simt::warp_max(lane() < simt::cluster_size() ? simt::read_cluster(&s.cluster_maximum, lane()) : -INFINITY);
}

// Sums of `a` and, if asked for, of `b`.
template <Group group>
LTK_DEVICE void group_sum(float* a, float* b, bool both) {
  *a = simt::warp_sum(*a);
  if (both) *b = simt::warp_sum(*b);
  if (group == Group::warp) return;
  Shared& s = shared();
  if (lane() == 0) {
    s.sums[0][warp()] = *a;
    s.sums[1][warp()] = *b;
  }
  simt::sync_block();
  *a = simt::warp_sum(lane() < warps() ? s.sums[0][lane()] : 0.0f);
  if (both) *b = simt::warp_sum(lane() < warps() ? s.sums[1][lane()] : 0.0f);
  if (group == Group::block) return;
  if (simt::thread() == 0) {
    s.cluster_sums[0] = *a;
    s.cluster_sums[1] = *b;
  }
  simt::sync_cluster();
  const bool reads = lane() < simt::cluster_size();
  *a = simt::warp_sum(reads ? simt::read_cluster(&s.cluster_sums[0], lane()) : 0.0f);
  if (both) *b = simt::warp_sum(reads ? simt::read_cluster(&s.cluster_sums[1], lane()) : 0.0f);
}

// Sums over a block in a fixed order; thread 0 gets them. Ends with a barrier.
struct Totals {
  double a, b;
};
LTK_DEVICE Totals block_sum(Totals mine) {
  Shared& s = shared();
  mine = {simt::warp_sum(mine.a), simt::warp_sum(mine.b)};
  if (lane() == 0) {
    s.totals[0][warp()] = mine.a;
    s.totals[1][warp()] = mine.b;
  }
  simt::sync_block();
  Totals all{0.0, 0.0};
  for (int w = 0; w < warps(); ++w) {
    all.a += s.totals[0][w];
    all.b += s.totals[1][w];
  }
  simt::sync_block();
  return all;
}

// Whether this block is the last of `blocks` to come here; the counter is then as it was. All that the blocks before
// wrote is visible to it.
LTK_DEVICE bool last_block(int* counter, int64_t blocks) {
  Shared& s = shared();
  simt::sync_block();
  if (simt::thread() == 0) {
    const int ticket = simt::take_ticket(counter);
    s.last = ticket == int(blocks) - 1;
    if (s.last) *counter = 0;
  }
  simt::sync_block();
  return s.last != 0;
}

// The smoothing constants, which depend on the classes alone: eps / K and sum ws (row_loss.h).
template <class T>
LTK_DEVICE void count_smoothing(const Call<T>& call, RowOptions<T>* options) {
  if (!(options->label_smoothing > T(0)) || (call.bias == nullptr && call.weight == nullptr)) return;
  Totals mine{0.0, 0.0};
  for (int64_t j = simt::thread(); j < call.classes; j += simt::threads()) {
    if (call.bias != nullptr && call.bias[j] == -T(INFINITY)) continue;
    mine.a += 1.0;
    mine.b += call.weight != nullptr ? double(call.weight[j]) : 1.0;
  }
  const Totals all = block_sum(mine);
  options->smoothing_per_class = T(double(options->label_smoothing) / all.a);
  options->smoothing_total = T(all.b);
}

template <class T>
LTK_DEVICE T smoothing_weight(const Call<T>& call, int64_t j) {
  if (call.bias != nullptr && call.bias[j] == -T(INFINITY)) return T(0);
  return call.weight != nullptr ? call.weight[j] : T(1);
}

template <class T>
constexpr T log2_e = T(1.4426950408889634074);
// The exponent of e^(s u - s max) to the base 2, for scale2 = s log2(e); 0 at the maximum.
template <class T>
LTK_DEVICE T exponent(T u, T scale2, T max) {
  return (u - max) * scale2;
}

// A label, or what is wrong with it.
struct Label {
  int64_t y;
  bool ignored;
  int error;
};
template <class T>
LTK_DEVICE int64_t raw_label(const Call<T>& call, int64_t row) {
  return label_at(call.target, call.target_type, call.target_layout.offset(row));
}
template <class T>
LTK_DEVICE Label check_range(const Call<T>& call, int64_t y) {
  const bool beyond = call.target_type == ElementType::u64 && y < 0;  // 2^63 or more
  const bool ignored = y == call.ignore_index && !beyond;
  return {y, ignored, !ignored && (y < 0 || y >= call.classes) ? label_out_of_range : 0};
}
template <class T>
LTK_DEVICE bool is_absent(const Call<T>& call, int64_t y) {
  return call.bias != nullptr && call.bias[y] == -T(INFINITY);
}
template <class T>
LTK_DEVICE Label check_label(const Call<T>& call, int64_t y) {
  Label label = check_range(call, y);
  if (!label.ignored && label.error == 0 && is_absent(call, label.y)) label.error = label_of_absent_class;
  return label;
}
template <class T>
LTK_DEVICE Label read_label(const Call<T>& call, int64_t row) {
  return check_label(call, raw_label(call, row));
}

template <class T>
LTK_DEVICE RowState<T> read_state(const RowState<T>* states, int64_t row) {
  RowState<T> state;
  if constexpr (sizeof(T) == 4) {
    const Vector v = reinterpret_cast<const Vector*>(states)[row];
    std::memcpy(&state, &v, sizeof state);
  } else {
    state = states[row];
  }
  return state;
}
template <class T>
LTK_DEVICE RowState<T> read_state(const Call<T>& call, int64_t row) {
  return read_state(reinterpret_cast<const RowState<T>*>(call.state), row);
}

template <class T>
LTK_DEVICE T margin_of(const Call<T>& call, int64_t y) {
  return call.margin != nullptr ? call.margin[y] : call.one_margin;
}

// What a row adds to the batch; by the one thread that finishes it.
template <class T>
LTK_DEVICE void add_row(const Call<T>& call, int64_t row, T loss, double weight, const RowState<T>& state,
                        Totals* totals) {
  reinterpret_cast<RowState<T>*>(call.state)[row] = state;
  if (call.reduction == Reduction::none) call.loss[row] = loss;
  totals->a += double(loss);
  totals->b += weight;
}

template <class T>
LTK_DEVICE double denominator_part(const Call<T>& call, int64_t row, int64_t y) {
  if (call.reduction != Reduction::mean_weight) return 1.0;
  return double(call.weight != nullptr && y >= 0 ? call.weight[y] : T(1)) *
         double(call.row_weight != nullptr ? call.row_weight[row] : T(1));
}

// A row that is ignored, or whose label is wrong: that is NaN, and the host is told.
template <class T>
LTK_DEVICE void add_row_without_logits(const Call<T>& call, int64_t row, const Label& label, Totals* totals) {
  const T value = label.error != 0 ? T(NAN) : T(0);
  if (label.error != 0) *call.error = label.error;
  add_row(call, row, value, label.error != 0 ? 1.0 : 0.0, RowState<T>{value, value, value, value}, totals);
}

// What the forward left for the backward; NaN if it was none of these kernels' (ltkernels/ops/cross_entropy.py).
template <class T>
LTK_DEVICE T read_inverse_denominator(const Call<T>& call, const T* at) {
  const T inverse = *at;
  if (!(inverse < T(0))) return inverse;
  *call.error = foreign_state;
  return T(NAN);
}
template <class T>
LTK_DEVICE T read_inverse_denominator(const Call<T>& call) {
  return read_inverse_denominator(call, call.state + 4 * call.rows);
}

// Loss and denominators of the batch, written by the block that comes last: the loss is the sum of what `given` labels
// of a row add up to, each by its own denominator.
template <class T, int labels>
LTK_DEVICE void finish_batch(const Call<T>& call, const Totals (&mine)[labels], int given, T* inverse_denominators) {
  if (call.reduction == Reduction::none) {
    if (simt::block() == 0 && simt::thread() == 0)
      for (int k = 0; k < labels; ++k) inverse_denominators[k] = T(1);
    return;
  }
  Totals* partials = reinterpret_cast<Totals*>(call.partials);
  for (int k = 0; k < labels; ++k) {
    const Totals block = block_sum(mine[k]);
    if (simt::thread() == 0) partials[simt::block() * labels + k] = block;
  }
  if (!last_block(call.tickets, simt::blocks())) return;
  double loss = 0.0;
  for (int k = 0; k < labels; ++k) {
    Totals sums{0.0, 0.0};
    for (int64_t b = simt::thread(); b < simt::blocks(); b += simt::threads()) {
      sums.a += partials[b * labels + k].a;
      sums.b += partials[b * labels + k].b;
    }
    const Totals all = block_sum(sums);
    double inverse = 1.0;
    if (k < given && call.reduction != Reduction::sum) inverse = all.b == 0.0 && call.empty_zero ? 0.0 : 1.0 / all.b;
    if (simt::thread() == 0) inverse_denominators[k] = T(inverse);
    loss += inverse == 0.0 ? 0.0 : all.a * inverse;  // 0 / 0 is torch's mean over nothing
  }
  if (simt::thread() == 0) *call.loss = T(loss);
}
template <class T>
LTK_DEVICE void finish_batch(const Call<T>& call, Totals mine) {
  const Totals of_label[1] = {mine};
  finish_batch(call, of_label, 1, call.state + 4 * call.rows);
}

}  // namespace ltk::cuda
