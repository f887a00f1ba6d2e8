// The kernels of LADE: one launch each way.
//
// Forward: the softmax along the rows and the log-sum-exp down the columns are done by blocks of their own, side by
// side: for a batch whose logits L2 holds, as those of this loss are, the second reader finds them there, and there are
// threads enough for small batches (a block with whole rows for both would need a batch of thousands). A column's sums
// over the splits of the rows are joined by the split that comes last, which has then seen all rows and finishes the
// classes of its chunk. Whoever is last of the row blocks and the chunks adds up the loss.
//
// Backward: elementwise, a thread keeps the tables of its columns in registers and walks down the rows.
#pragma once

#include <cmath>

#include "cuda/batch.cuh"
#include "cuda/cross_entropy_any.cuh"
#include "cuda/lade.h"
#include "cuda/online_sum.cuh"

namespace ltk::cuda {

LTK_HOST_DEVICE_MEMBER constexpr int lade_vector(int width, LadeAccess access) {
  return access == LadeAccess::aligned ? width : 1;
}
constexpr int lade_backward_threads = 128;

// --- Along the rows ---

// The row's softmax at its label: everything but the label's term, which finish_row adds.
template <class E, class T, int a_row, LadeAccess access>
LTK_DEVICE OnlineSum<T> sum_others(const LadeCall<T>& call, const AnyRow<E, T>& row, int64_t r, int64_t y, int first) {
  OnlineSum<T> sum;
  if constexpr (access != LadeAccess::any) {
    const AlignedRow<E> aligned(call.input, call.input_layout.offset(r), call.classes);
    for (int v = first; v < aligned.vectors(); v += a_row) {
      T u[width<E>];
      decode(aligned.load(v), u, E{});
#pragma unroll
      for (int k = 0; k < width<E>; ++k) {
        const int j = aligned.first(v) + k;
        const bool taken = j >= 0 && j < call.classes && j != y;
        if (call.bias != nullptr && taken) u[k] += call.bias[j];
        u[k] = taken ? u[k] : -T(INFINITY);
      }
      sum.add(u);
    }
  } else {
    constexpr int together = 4;
    for (int64_t begin = first; begin < call.classes; begin += together * a_row) {
      T u[together];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const int64_t j = begin + k * a_row;
        u[k] = j < call.classes && j != y ? row.adjusted(j) : -T(INFINITY);
      }
      sum.add(u);
    }
  }
  return sum;
}

template <class E, class T, int a_row, LadeAccess access>
LTK_DEVICE void forward_row(const LadeCall<T>& call, int64_t r, int first, Totals* totals) {
  const Label label = read_label(call, r);
  T* state = call.state + 3 * r;
  if (label.ignored || label.error != 0 || !call.with_ce) {
    if (first != 0) return;
    const T value = label.error != 0 ? T(NAN) : T(0);
    if (label.error != 0) *call.error = label.error;
    state[0] = state[1] = state[2] = value;
    totals->a += double(value);
    totals->b += label.ignored ? 0.0 : 1.0;
    return;
  }
  const AnyRow<E, T> row(call, r);
  const T own = row.adjusted(label.y);
  OnlineSum<T> sum = sum_others<E, T, a_row, access>(call, row, r, label.y, first);
  T max = row_max<a_row>(sum.max);
  max = own > max ? own : max;
  sum.rise(max);
  const T others = row_sum<a_row>(sum.sum);
  if (first != 0) return;
  const T at_label = simt::exp2(exponent(own, log2_e<T>, sum.reference())), total = others + at_label;
  // log1p keeps the digits of a small loss, and -others those of a small p - 1.
  const T loss = at_label > others ? std::log1p(others / at_label) : max - own + std::log(total);
  state[0] = max;
  state[1] = T(1) / total;
  state[2] = -others / total;
  totals->a += double(loss);
  totals->b += 1.0;
}

// --- Down the columns ---

// Where a thread stands in a chunk: V columns from `column` on, and the rows `lane`, `lane + lanes`, ... of a split.
template <int V>
struct ColumnPlace {
  int index, lane, lanes;
  int64_t chunk, begin, column;

  LTK_DEVICE ColumnPlace(const LadeGrid& grid, int64_t chunk) : lanes(simt::threads() / grid.width), chunk(chunk) {
    index = grid.rows_first ? simt::thread() / lanes : simt::thread() % grid.width;
    lane = grid.rows_first ? simt::thread() % lanes : simt::thread() / grid.width;
    begin = chunk * grid.width * V;
    column = begin + index * V;
  }
};

// The logits of a row from a column on.
template <class E, class T, int V>
LTK_DEVICE void load_columns(const LadeCall<T>& call, int64_t r, int64_t column, T (&z)[V]) {
  const E* x = static_cast<const E*>(call.input) + call.input_layout.offset(r);
  if constexpr (V > 1)
    decode(*reinterpret_cast<const Vector*>(x + column), z, E{});
  else
    z[0] = T(widen(x[column * call.input_layout.stride_class]));
}

// The sums of a chunk's columns over the rows of a split, to memory.
template <class E, class T, int V>
LTK_DEVICE void sum_columns(const LadeCall<T>& call, const ColumnPlace<V>& place, int64_t split) {
  const int64_t splits = call.grid.splits;
  OnlineSum<T> sums[V];
  T own[V], number[V], rows = T(0);
#pragma unroll
  for (int k = 0; k < V; ++k) own[k] = number[k] = T(0);
  constexpr int together = V > 1 ? 2 : 4;  // rows whose loads are on the way at once
  const int64_t end = place.column < call.classes ? call.rows * (split + 1) / splits : 0;
  for (int64_t r = call.rows * split / splits + place.lane; r < end; r += together * place.lanes) {
    T z[together][V], offset[together];
    int64_t y[together];
    bool used[together];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const int64_t row = r + i * place.lanes;
      used[i] = row < end;
      if (used[i]) {
        const Label label = check_range(call, raw_label(call, row));
        used[i] = !label.ignored && label.error == 0;
        y[i] = label.y - place.column;
      }
      if (used[i]) load_columns<E, T, V>(call, row, place.column, z[i]);
      offset[i] = used[i] && call.row_offset != nullptr ? call.row_offset[y[i] + place.column] : T(0);
      rows += used[i] ? T(1) : T(0);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      T u[together];
#pragma unroll
      for (int i = 0; i < together; ++i) {
        u[i] = used[i] ? z[i][k] + offset[i] : -T(INFINITY);
        if (used[i] && y[i] == k) {
          own[k] += z[i][k];
          number[k] += T(1);
        }
      }
      sums[k].add(u);
    }
  }

  // Over the lanes, in their order.
  const bool writes = place.lane == 0 && place.column < call.classes;
  T* slots = reinterpret_cast<T*>(simt::shared_memory() + shared_header);
  const int threads = simt::threads();
  const auto slot = [&](int part, int lane) -> T& {
    return slots[(part * place.lanes + lane) * call.grid.width + place.index];
  };
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (place.lanes > 1) {
      simt::sync_block();  // the memory may still be read for the column before
      slot(0, place.lane) = sums[k].max;
      slot(1, place.lane) = sums[k].sum;
      slot(2, place.lane) = own[k];
      slot(3, place.lane) = number[k];
      if (k == 0) slots[4 * threads + simt::thread()] = rows;
      simt::sync_block();
    }
    if (!writes || place.column + k >= call.classes) continue;
    for (int lane = 1; lane < place.lanes; ++lane) {
      sums[k].join(slot(0, lane), slot(1, lane));
      own[k] += slot(2, lane);
      number[k] += slot(3, lane);
    }
    T* partials = call.column_partials + split * 4 * call.classes + place.column + k;
    partials[0] = sums[k].max;
    partials[call.classes] = sums[k].sum;
    partials[2 * call.classes] = own[k];
    partials[3 * call.classes] = number[k];
  }
  if (simt::thread() != 0) return;  // of the first column, which is always there
  double count = double(rows);
  for (int lane = 1; lane < place.lanes; ++lane)
    count += double(slots[4 * threads + (call.grid.rows_first ? lane : lane * call.grid.width)]);
  double* counts = call.partials + 2 * call.grid.row_blocks + call.grid.chunks;
  counts[place.chunk * splits + split] = count;
}

// The classes of a chunk, once all splits are done: their part of the state, and of the regulariser.
template <class T, int V>
LTK_DEVICE void finish_chunk(const LadeCall<T>& call, const ColumnPlace<V>& place) {
  const LadeGrid& grid = call.grid;
  double* chunk_sums = call.partials + 2 * grid.row_blocks;
  const double* counts = chunk_sums + grid.chunks + place.chunk * grid.splits;
  double rows = 0.0;
  for (int64_t s = 0; s < grid.splits; ++s) rows += counts[s];
  const double log_rows = std::log(rows);
  T* states = call.state + 3 * call.rows;
  int64_t end = place.begin + int64_t(grid.width) * V;
  end = end < call.classes ? end : call.classes;
  Totals mine{0.0, 0.0};
  for (int64_t j = place.begin + simt::thread(); j < end; j += simt::threads()) {
    const T* partials = call.column_partials + j;
    T max = -T(INFINITY);
    for (int64_t s = 0; s < grid.splits; ++s) {
      const T other = partials[s * 4 * call.classes];
      max = other > max ? other : max;
    }
    const T base = max == -T(INFINITY) ? T(0) : max;
    double sum = 0.0, own = 0.0, number = 1e-8;
    for (int64_t s = 0; s < grid.splits; ++s) {
      const T* of_split = partials + s * 4 * call.classes;
      sum += double(of_split[call.classes]) * double(simt::exp2(exponent(of_split[0], log2_e<T>, base)));
      own += double(of_split[2 * call.classes]);
      number += double(of_split[3 * call.classes]);
    }
    const double log_sum = double(base) + std::log(sum), share = double(call.prior[j]);
    const double bound = log_sum - log_rows + (call.class_offset != nullptr ? double(call.class_offset[j]) : 0.0);
    mine.a -= share * (own / number - bound - double(call.remine_lambda) * bound * bound);
    states[j] = T(double(call.strength) * share * (1.0 + 2.0 * double(call.remine_lambda) * bound));
    states[call.classes + j] = T(log_sum);
    states[2 * call.classes + j] = T(double(call.strength) * share / number);
  }
  mine = block_sum(mine);
  if (simt::thread() == 0) chunk_sums[place.chunk] = mine.a;
}

// By the block that comes last.
template <class T>
LTK_DEVICE void finish_lade(const LadeCall<T>& call) {
  const LadeGrid& grid = call.grid;
  const Totals* of_rows = reinterpret_cast<const Totals*>(call.partials);
  const double* of_chunks = call.partials + 2 * grid.row_blocks;
  Totals rows{0.0, 0.0}, columns{0.0, 0.0};
  for (int64_t b = simt::thread(); b < grid.row_blocks; b += simt::threads()) {
    rows.a += of_rows[b].a;
    rows.b += of_rows[b].b;
  }
  for (int64_t c = simt::thread(); c < grid.chunks; c += simt::threads()) columns.a += of_chunks[c];
  rows = block_sum(rows);
  columns = block_sum(columns);
  T* states = call.state + 3 * call.rows;
  if (grid.chunks == 0)
    for (int64_t i = simt::thread(); i < 3 * call.classes; i += simt::threads()) states[i] = T(0);
  if (simt::thread() != 0) return;
  states[3 * call.classes] = T(1.0 / rows.b);
  // The sum of the rows is 0 or NaN without the cross-entropy, and 0 / 0 where there are none.
  *call.loss = T(rows.a / rows.b + double(call.strength) * columns.a);
}

template <class T, LadeAccess access>
constexpr int lade_blocks(int threads) {  // a thread with a vector of columns has 4 sums of each
  return (sizeof(T) == 8 || access == LadeAccess::aligned ? 512 : 768) / threads;
}

template <class E, class T, int a_row, LadeAccess access>
LTK_KERNEL(any_threads(a_row), (lade_blocks<T, access>(any_threads(a_row))))
lade_forward_kernel(const LadeCall<T> call) {
  constexpr int V = lade_vector(width<E>, access), rows = any_threads(a_row) / a_row;
  const LadeGrid& grid = call.grid;
  const int64_t column_blocks = grid.chunks * grid.splits;
  if (simt::block() < column_blocks) {
    const ColumnPlace<V> place(grid, simt::block() % grid.chunks);
    sum_columns<E, T, V>(call, place, simt::block() / grid.chunks);
    if (!last_block(call.tickets + 1 + place.chunk, grid.splits)) return;
    finish_chunk<T, V>(call, place);
  } else {
    const int64_t block = simt::block() - column_blocks;
    Totals totals{0.0, 0.0};
    for (int64_t r = block * rows + simt::thread() / a_row; r < call.rows; r += grid.row_blocks * rows)
      forward_row<E, T, a_row, access>(call, r, simt::thread() % a_row, &totals);
    totals = block_sum(totals);
    if (simt::thread() == 0) reinterpret_cast<Totals*>(call.partials)[block] = totals;
  }
  if (last_block(call.tickets, grid.row_blocks + grid.chunks)) finish_lade(call);
}

// --- Backward ---

template <class E, class T, LadeAccess access>
LTK_KERNEL(lade_backward_threads, (lade_blocks<T, access>(lade_backward_threads)))
lade_backward_kernel(const LadeCall<T> call) {
  constexpr int V = lade_vector(width<E>, access);
  const LadeGrid& grid = call.grid;
  const ColumnPlace<V> place(grid, simt::block() % grid.chunks);
  const int64_t split = simt::block() / grid.chunks;
  const T* states = call.state + 3 * call.rows;
  const T inverse = read_inverse_denominator(call, states + 3 * call.classes);
  if (place.column >= call.classes) return;
  const T upstream = call.upstream[0] * (inverse == inverse ? T(1) : inverse);  // NaN too for a foreign state
  const bool with_columns = call.strength > T(0);
  T bias[V], factor[V], log_sum[V], label_loss[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int64_t j = place.column + k;
    bias[k] = call.bias != nullptr ? call.bias[j] : T(0);
    factor[k] = with_columns ? states[j] : T(0);
    log_sum[k] = with_columns ? states[call.classes + j] : T(0);
    label_loss[k] = with_columns ? states[2 * call.classes + j] : T(0);
  }
  constexpr int together = V > 1 ? 2 : 4;
  const int64_t end = call.rows * (split + 1) / grid.splits;
  for (int64_t r = call.rows * split / grid.splits + place.lane; r < end; r += together * place.lanes) {
    T z[together][V];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const int64_t row = r + i * place.lanes;
      load_columns<E, T, V>(call, row < end ? row : r, place.column, z[i]);
    }
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const int64_t row = r + i * place.lanes;
      if (row >= end) break;
      const Label label = read_label(call, row);
      const T* state = call.state + 3 * row;
      const T offset =
          call.row_offset != nullptr && !label.ignored && label.error == 0 ? call.row_offset[label.y] : T(0);
      const T max = state[0], probability = inverse * state[1];
      const T wrong = label.error != 0 ? T(NAN) : T(0);
      T d[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const bool at_label = label.y == place.column + k;
        d[k] = wrong;
        if (with_columns) {
          d[k] += factor[k] * simt::exp2(exponent(z[i][k], log2_e<T>, log_sum[k] - offset));
          if (at_label) d[k] -= label_loss[k];
        }
        if (call.with_ce)
          d[k] += at_label ? inverse * state[2] : probability * simt::exp2(exponent(z[i][k] + bias[k], log2_e<T>, max));
        d[k] = label.ignored ? T(0) : d[k] * upstream;
      }
      E* out = static_cast<E*>(call.gradient) + call.gradient_layout.offset(row);
      if constexpr (V > 1)
        simt::store16(out + place.column, encode(d, E{}).words);
      else
        narrow(out + place.column * call.gradient_layout.stride_class, d[0]);
    }
  }
}

}  // namespace ltk::cuda
