// Which rows are predicted right, compiled once per instruction set.
//
// A row is right if fewer than k classes come before its label. So it takes one comparison a logit and no sorting, and
// a row that is wrong is left where k of them have been found: after the first block of columns most of the time.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/accuracy_counts.h"
#include "cpu/simd.h"

namespace ltk::LTK_ISA {
namespace {

constexpr int64_t block = 256;           // columns after which a row may be left
constexpr int64_t rows_ahead = 4;        // of which a row's first logits and its label's are fetched
constexpr int64_t fetched_bytes = 1024;  // of a row at least: shorter ones the processor fetches ahead by itself
constexpr int64_t tile_rows = 64;        // that pass together where classes are strided

// T: what is compared, which has the logits' values exactly.
template <class E>
using Compared = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Columns of a block as T, in memory: themselves, or in `scratch`.
template <class T, class E>
LTK_INLINE const T* widened(const E* x, int64_t count, T* scratch) {
  if constexpr (std::is_same_v<E, T>) {
    return x;
  } else {
    widen(x, count, scratch);
    return scratch;
  }
}

template <class T>
LTK_INLINE int64_t count_true(IntVec<T> minus_counts) {
  int64_t total = 0;
  for (int64_t k = 0; k < lanes<T>; ++k) total -= minus_counts[k];
  return total;
}

// Of `count` columns, how many come before the label's, which is the column y of them: before all for y < 0, behind all
// for y >= count. `own` is not NaN.
template <class T>
LTK_INLINE int64_t count_before(const T* x, int64_t count, int64_t y, T own) {
  const Vec<T> label = splat(own);
  IntVec<T> found{};  // minus how many
  const auto mixed = [&](Vec<T> v, int64_t j) {
    IntVec<T> lane;
    for (int64_t k = 0; k < lanes<T>; ++k) lane[k] = decltype(lane[0] + 0)(k);
    const auto place = std::clamp<int64_t>(y - j, 0, lanes<T>);
    const IntVec<T> earlier = lane < (decltype(lane[0] + 0))(place);
    found += (earlier & ~(v < label)) | (~earlier & ~(v <= label));
  };
  const int64_t whole = count / lanes<T> * lanes<T>;
  const int64_t of_label = std::clamp<int64_t>(y < 0 ? 0 : y / lanes<T> * lanes<T>, 0, whole);  // its vector
  int64_t j = 0;
  for (; j < of_label; j += lanes<T>) found += ~(load(x + j) < label);
  if (y >= 0 && j < whole) {
    mixed(load(x + j), j);
    j += lanes<T>;
  }
  for (; j < whole; j += lanes<T>) found += ~(load(x + j) <= label);
  // Lanes past the end count as later columns at -inf, or, where the label is in a block to come, as below any.
  if (j < count) {
    if (y >= count) {
      int64_t rest = 0;
      for (; j < count; ++j) rest += !(x[j] < own);
      return count_true<T>(found) + rest;
    }
    mixed(load_first(x + j, count - j, -std::numeric_limits<T>::infinity()), j);
  }
  return count_true<T>(found);
}

template <class E>
bool row_is_right(const E* x, int64_t classes, int64_t y, int64_t top_k) {
  using T = Compared<E>;
  const T own = T(to_float(x[y]));
  int64_t before = 0;
  if (own != own) {
    for (int64_t j = 0; j < y && before < top_k; ++j) before += comes_before(T(to_float(x[j])), true, own);
    return before < top_k;
  }
  alignas(64) T scratch[std::is_same_v<E, T> ? 1 : block];
  for (int64_t first = 0; first < classes; first += block) {
    const int64_t count = std::min(block, classes - first);
    before += count_before(widened<T>(x + first, count, scratch), count, y - first, own);
    if (before >= top_k) return false;
  }
  return true;
}

// Classes side by side: row by row.
template <class E>
void mark_rows(const AccuracyCall& call, int64_t begin, int64_t end, uint8_t* right) {
  const E* x = static_cast<const E*>(call.input);
  const bool fetches = call.classes * int64_t(sizeof(E)) >= fetched_bytes;
  for (int64_t r = begin; r < end; ++r) {
    if (fetches && r + rows_ahead < end) {
      const int64_t ahead = r + rows_ahead, y = counted_label(call, ahead).y;
      const E* row = x + call.input_layout.offset(ahead);
      __builtin_prefetch(row);
      if (y >= 0 && y < call.classes) __builtin_prefetch(row + y);
    }
    const CountedLabel label = counted_label(call, r);
    right[r] = !label.ignored && label.in_range &&
               row_is_right(x + call.input_layout.offset(r), call.classes, label.y, call.top_k);
  }
}

// Classes apart: rows that may be neighbours pass together, column by column.
template <class E>
void mark_strided(const AccuracyCall& call, int64_t begin, int64_t end, uint8_t* right) {
  using T = Compared<E>;
  const E* x = static_cast<const E*>(call.input);
  const int64_t stride = call.input_layout.stride_class;
  for (int64_t first = begin; first < end; first += tile_rows) {
    const int64_t rows = std::min(tile_rows, end - first);
    int64_t offset[tile_rows], label[tile_rows], before[tile_rows];
    T own[tile_rows];
    for (int64_t r = 0; r < rows; ++r) {
      const CountedLabel of_row = counted_label(call, first + r);
      const bool counts = !of_row.ignored && of_row.in_range;
      offset[r] = call.input_layout.offset(first + r);
      label[r] = counts ? of_row.y : 0;
      before[r] = counts ? 0 : call.top_k;  // wrong already
      own[r] = T(to_float(x[offset[r] + label[r] * stride]));
    }
    for (int64_t j = 0; j < call.classes; ++j)
      for (int64_t r = 0; r < rows; ++r)
        before[r] += j != label[r] && comes_before(T(to_float(x[offset[r] + j * stride])), j < label[r], own[r]);
    for (int64_t r = 0; r < rows; ++r) right[first + r] = before[r] < call.top_k;
  }
}

template <class E>
void mark_of(const AccuracyCall& call, int64_t begin, int64_t end, uint8_t* right) {
  if (call.input_layout.stride_class == 1 || call.classes == 1) return mark_rows<E>(call, begin, end, right);
  mark_strided<E>(call, begin, end, right);
}

void mark(const AccuracyCall& call, int64_t begin, int64_t end, uint8_t* right) {
  switch (call.input_type) {
    case ElementType::f64:
      return mark_of<double>(call, begin, end, right);
    case ElementType::f32:
      return mark_of<float>(call, begin, end, right);
    case ElementType::bf16:
      return mark_of<BFloat16>(call, begin, end, right);
    default:
      return mark_of<Float16>(call, begin, end, right);
  }
}

}  // namespace

extern const AccuracyCountsTable accuracy_counts_table;
const AccuracyCountsTable accuracy_counts_table = {mark};

}  // namespace ltk::LTK_ISA
