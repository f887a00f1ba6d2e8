// The rows of a sample's experts side by side: a thread takes the same columns of all of them, in groups of `count`:
// begin, begin + step, ... It loads a group at once and computes with `part` columns of it at a time, all of them or
// half, so that all that belongs to them finds room in registers.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/cross_entropy_any.cuh"

namespace ltk::cuda {

// Experts whose logits a thread holds together; with more, they take turns.
constexpr int experts_at_once = 3;

// 16 bytes at a time, where classes lie side by side. Groups lie as the vectors of the row `base` do.
template <class E, class T>
struct VectorColumns {
  static constexpr int count = width<E>, part = 4;
  using Held = Vector;
  using Index = int;
  int shift, classes, begin, end, step;

  LTK_DEVICE VectorColumns(const E* base, int64_t number, int first, int threads) : begin(first), step(threads) {
    const AlignedRow<E> row(base, 0, number);
    shift = row.shift;
    classes = row.classes;
    end = row.vectors();
  }
  LTK_DEVICE int column(int v, int k) const { return v * count - shift + k; }
  LTK_DEVICE bool inside(int v, int k) const { return column(v, k) >= 0 && column(v, k) < classes; }

  LTK_DEVICE Held load(const E* row, int64_t, int v) const {
    const AlignedRow<E> aligned(row, 0, classes);
    return aligned.shift == shift ? aligned.load(v) : aligned.load_from(column(v, 0));
  }
  LTK_DEVICE void decode(const Held& held, int from, T (&x)[part]) const {
    constexpr int words = part * int(sizeof(E)) / 4;
    Vector first = held;
#pragma unroll
    for (int w = 0; w + words < 4; ++w) first.words[w] = from == 0 ? held.words[w] : held.words[w + words];
    T all[count];
    cuda::decode(first, all, E{});
#pragma unroll
    for (int k = 0; k < part; ++k) x[k] = all[k];
  }
  LTK_DEVICE void store(E* row, int64_t, int v, const T (&d)[count]) const {
    const AlignedRow<E> aligned(row, 0, classes);
    if (aligned.shift == shift) return aligned.store(v, d);
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (inside(v, k)) narrow(row + column(v, k), d[k]);
  }

  // Of a table, or into one, with a number for each column; outside the row they are `outside`.
  LTK_DEVICE bool has_vector(const T* at, int v, int from) const {
    return inside(v, from) && inside(v, from + part - 1) && reinterpret_cast<uintptr_t>(at) % sizeof(Vector) == 0;
  }
  LTK_DEVICE void read(const T* table, int v, int from, T outside, T (&x)[part]) const {
    const T* at = table + column(v, from);
    if (has_vector(at, v, from)) return cuda::decode(*reinterpret_cast<const Vector*>(at), x, T{});
#pragma unroll
    for (int k = 0; k < part; ++k) x[k] = inside(v, from + k) ? at[k] : outside;
  }
  LTK_DEVICE void write(T* table, int v, int from, const T (&x)[part]) const {
    T* at = table + column(v, from);
    if (has_vector(at, v, from)) return simt::store16(at, encode(x, T{}).words);
#pragma unroll
    for (int k = 0; k < part; ++k)
      if (inside(v, from + k)) at[k] = x[k];
  }
};

// Any strides: neighbouring threads at neighbouring columns.
template <class E, class T>
struct AnyColumns {
  static constexpr int count = sizeof(T) == 8 ? 2 : 4, part = 2;  // loads of a row that are on the way together
  struct Held {
    T x[count];
  };
  using Index = int64_t;
  int64_t begin, end, step;
  int threads;

  LTK_DEVICE AnyColumns(const E*, int64_t classes, int first, int threads)
      : begin(first), end(classes), step(int64_t(count) * threads), threads(threads) {}
  LTK_DEVICE int64_t column(int64_t group, int k) const { return group + k * threads; }
  LTK_DEVICE bool inside(int64_t group, int k) const { return column(group, k) < end; }

  template <class F>
  LTK_DEVICE Held load(const F* row, int64_t stride, int64_t group) const {
    Held held;
#pragma unroll
    for (int k = 0; k < count; ++k) held.x[k] = inside(group, k) ? T(widen(row[column(group, k) * stride])) : T(0);
    return held;
  }
  LTK_DEVICE void decode(const Held& held, int from, T (&x)[part]) const {
#pragma unroll
    for (int k = 0; k < part; ++k) x[k] = from == 0 ? held.x[k] : held.x[(part + k) % count];
  }
  LTK_DEVICE void store(E* row, int64_t stride, int64_t group, const T (&d)[count]) const {
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (inside(group, k)) narrow(row + column(group, k) * stride, d[k]);
  }
  LTK_DEVICE void read(const T* table, int64_t group, int from, T outside, T (&x)[part]) const {
#pragma unroll
    for (int k = 0; k < part; ++k) x[k] = inside(group, from + k) ? table[column(group, from + k)] : outside;
  }
  LTK_DEVICE void write(T* table, int64_t group, int from, const T (&x)[part]) const {
#pragma unroll
    for (int k = 0; k < part; ++k)
      if (inside(group, from + k)) table[column(group, from + k)] = x[k];
  }
};

template <class E, class T, bool vectors>
using Columns = std::conditional_t<vectors, VectorColumns<E, T>, AnyColumns<E, T>>;

// The logits of a sample's experts, or their gradients.
template <class E>
struct ExpertRows {
  E* sample;
  int64_t stride_expert, stride_class;

  LTK_DEVICE ExpertRows(const void* memory, const Layout& layout, int64_t i)
      : sample(static_cast<E*>(const_cast<void*>(memory)) + i * layout.stride_inner),
        stride_expert(layout.stride_outer),
        stride_class(layout.stride_class) {}
  LTK_DEVICE E* row(int64_t e) const { return sample + e * stride_expert; }
};

// Of a few experts of a sample, beginning with `first`, the logits of a group of columns.
template <class E, class C>
struct HeldExperts {
  typename C::Held held[experts_at_once];

  template <class Group>
  LTK_DEVICE HeldExperts(const ExpertRows<E>& rows, const C& columns, int64_t first, int64_t number, Group group) {
#pragma unroll
    for (int k = 0; k < experts_at_once; ++k)
      if (k < number) held[k] = columns.load(rows.row(first + k), rows.stride_class, group);
  }
};

// The sums, or the maxima, of several numbers over the threads that share a sample; each gets all.
constexpr int most_reduced = 3 * experts_at_once + 1;
template <class T>
constexpr int64_t reduced_bytes = most_reduced * 8 * int64_t(sizeof(T));  // of a block that shares a sample

template <int a_row, bool maxima, class T, int count>
LTK_DEVICE void reduce_rows(T (&x)[count]) {
  static_assert(count <= most_reduced, "");
  if constexpr (a_row > 1) {
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = maxima ? simt::warp_max(x[k]) : simt::warp_sum(x[k]);
  }
  if constexpr (a_row > simt::warp_size) {
    constexpr int warps = 8;
    T* slots = reinterpret_cast<T*>(simt::shared_memory() + shared_header);
    simt::sync_block();  // the memory may still be read for the numbers before
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (lane() == 0) slots[k * warps + warp()] = x[k];
    simt::sync_block();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      x[k] = slots[k * warps + lane() % warps];
#pragma unroll
      for (int mask = warps / 2; mask > 0; mask /= 2) {
        const T other = simt::exchange(x[k], mask);
        x[k] = !maxima ? x[k] + other : other > x[k] ? other : x[k];
      }
    }
  }
}

}  // namespace ltk::cuda
