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

constexpr int64_t first_block = 64;      // columns after which a row may be left: most wrong rows are, here
constexpr int64_t block = 256;           // and then
constexpr int64_t rows_ahead = 4;        // of which the first block and the label's logit are fetched
constexpr int64_t fetched_bytes = 1024;  // of a row at least: shorter ones the processor fetches ahead by itself
constexpr int64_t tile_rows = 64;  // whose labels are read together, and that pass together where classes are strided

// --- Labels ---

// As int64. What int64 does not hold becomes a number that is no class and not ignored.
template <class Y>
LTK_INLINE int64_t as_label(Y value, int64_t ignore_index) {
  if constexpr (std::is_same_v<Y, uint64_t>) {
    constexpr int64_t none = std::numeric_limits<int64_t>::min();
    if (value >> 63 != 0) return ignore_index == none ? none + 1 : none;
  }
  return static_cast<int64_t>(value);
}

template <class Y>
void read_labels_as(const void* from, const Layout& layout, int64_t ignore_index, int64_t first, int64_t count,
                    int64_t* y) {
  const Y* values = static_cast<const Y*>(from);
  if (layout.inner == 1 && layout.stride_outer == 1) {
    for (int64_t k = 0; k < count; ++k) y[k] = as_label(values[first + k], ignore_index);
    return;
  }
  int64_t place = first % layout.inner;
  const Y* group = values + first / layout.inner * layout.stride_outer;
  for (int64_t k = 0; k < count; ++k) {
    y[k] = as_label(group[place * layout.stride_inner], ignore_index);
    if (++place == layout.inner) {
      place = 0;
      group += layout.stride_outer;
    }
  }
}

void read_labels(const void* from, ElementType type, const Layout& layout, int64_t ignore_index, int64_t first,
                 int64_t count, int64_t* y) {
  switch (type) {
    case ElementType::i64:
      return read_labels_as<int64_t>(from, layout, ignore_index, first, count, y);
    case ElementType::i32:
      return read_labels_as<int32_t>(from, layout, ignore_index, first, count, y);
    case ElementType::i16:
      return read_labels_as<int16_t>(from, layout, ignore_index, first, count, y);
    case ElementType::i8:
      return read_labels_as<int8_t>(from, layout, ignore_index, first, count, y);
    case ElementType::u64:
      return read_labels_as<uint64_t>(from, layout, ignore_index, first, count, y);
    case ElementType::u32:
      return read_labels_as<uint32_t>(from, layout, ignore_index, first, count, y);
    case ElementType::u16:
      return read_labels_as<uint16_t>(from, layout, ignore_index, first, count, y);
    default:
      return read_labels_as<uint8_t>(from, layout, ignore_index, first, count, y);
  }
}

// The labels of `count` <= tile_rows rows from `first` on; -1 where a row does not count.
struct Labels {
  int64_t y[tile_rows];

  Labels(const AccuracyCall& call, int64_t first, int64_t count) {
    read_labels(call.target, call.target_type, call.target_layout, call.ignore_index, first, count, y);
    for (int64_t k = 0; k < count; ++k)
      y[k] = y[k] != call.ignore_index && uint64_t(y[k]) < uint64_t(call.classes) ? y[k] : -1;
  }
};

void read_predicted(const AccuracyCall& call, int64_t first, int64_t count, int64_t* predicted) {
  read_labels(call.input, call.input_type, call.input_layout, call.ignore_index, first, count, predicted);
}

bool in_range(const AccuracyCall& call) {
  const bool of_labels = !is_floating(call.input_type);
  for (int64_t first = 0; first < call.rows; first += tile_rows) {
    const int64_t count = std::min(tile_rows, call.rows - first);
    int64_t y[tile_rows], predicted[tile_rows];
    read_labels(call.target, call.target_type, call.target_layout, call.ignore_index, first, count, y);
    int64_t bad = 0;
    for (int64_t k = 0; k < count; ++k) bad |= (y[k] != call.ignore_index) & (uint64_t(y[k]) >= uint64_t(call.classes));
    if (of_labels) {
      read_predicted(call, first, count, predicted);
      for (int64_t k = 0; k < count; ++k)
        bad |= (y[k] != call.ignore_index) & (uint64_t(predicted[k]) >= uint64_t(call.classes));
    }
    if (bad != 0) return false;
  }
  return true;
}

void add(const AccuracyCall& call, const uint8_t* right) {
  int64_t *const correct = call.correct, *const total = call.total;
  for (int64_t first = 0; first < call.rows; first += tile_rows) {
    const int64_t count = std::min(tile_rows, call.rows - first);
    const Labels labels(call, first, count);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t y = labels.y[k];
      if (y < 0) continue;
      total[y] += 1;
      correct[y] += right[first + k];
    }
  }
}

// --- How many classes come before the label's ---

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

// Which lanes of a vector compare true, and how many they were. Where the instruction set makes bits of a comparison
// and counts them, that leaves nothing to add up across lanes, which would be most of the work for a row of one vector.
#if defined(__AVX2__)
template <class T>
using Lanes = uint32_t;

  #if defined(__AVX512F__)
    #define LTK_COMPARED(v, w, how)                                                 \
      (sizeof(T) == 4 ? Lanes<T>(_mm512_cmp_ps_mask((__m512)(v), (__m512)(w), how)) \
                      : Lanes<T>(_mm512_cmp_pd_mask((__m512d)(v), (__m512d)(w), how)))
  #else
    #define LTK_COMPARED(v, w, how)                                                                \
      (sizeof(T) == 4 ? Lanes<T>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)(v), (__m256)(w), how))) \
                      : Lanes<T>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)(v), (__m256d)(w), how))))
  #endif

// Not v < w, so true where one of them is NaN.
template <class T>
LTK_INLINE Lanes<T> not_below(Vec<T> v, Vec<T> w) {
  return LTK_COMPARED(v, w, _CMP_NLT_UQ);
}

template <class T>
LTK_INLINE Lanes<T> above(Vec<T> v, Vec<T> w) {
  return LTK_COMPARED(v, w, _CMP_NLE_UQ);
}

// The first `place` lanes, all for more than there are.
template <class T>
LTK_INLINE Lanes<T> first_lanes(int64_t place) {
  return (Lanes<T>(1) << std::clamp<int64_t>(place, 0, lanes<T>)) - 1;
}

template <class T>
struct Counter {
  int64_t count = 0;
  LTK_INLINE void add(Lanes<T> found) { count += __builtin_popcount(found); }
  LTK_INLINE int64_t total() const { return count; }
};
#else
template <class T>
using Lanes = IntVec<T>;

template <class T>
LTK_INLINE Lanes<T> not_below(Vec<T> v, Vec<T> w) {
  return ~(v < w);
}

template <class T>
LTK_INLINE Lanes<T> above(Vec<T> v, Vec<T> w) {
  return ~(v <= w);
}

template <class T>
LTK_INLINE Lanes<T> first_lanes(int64_t place) {
  using Lane = std::remove_reference_t<decltype(Lanes<T>{}[0] + 0)>;
  Lanes<T> lane;
  for (int64_t k = 0; k < lanes<T>; ++k) lane[k] = Lane(k);
  return lane < Lane(std::clamp<int64_t>(place, 0, lanes<T>));
}

template <class T>
struct Counter {
  Lanes<T> minus_count{};
  LTK_INLINE void add(Lanes<T> found) { minus_count += found; }
  LTK_INLINE int64_t total() const {
    int64_t sum = 0;
    for (int64_t k = 0; k < lanes<T>; ++k) sum -= minus_count[k];
    return sum;
  }
};
#endif

// Of a vector whose lane `place` may be the label's. above implies not_below.
template <class T>
LTK_INLINE Lanes<T> before_label(Vec<T> v, Vec<T> label, int64_t place) {
  return above<T>(v, label) | (not_below<T>(v, label) & first_lanes<T>(place));
}

// Of `count` columns, how many come before the label's, which is the column y of them: before all for y < 0, behind all
// for y >= count. `own` is not NaN.
template <class T>
LTK_INLINE int64_t count_before(const T* x, int64_t count, int64_t y, T own) {
  const Vec<T> label = splat(own);
  Counter<T> before;
  const int64_t whole = count & -lanes<T>;
  const int64_t mixed = std::clamp<int64_t>(y & -lanes<T>, 0, whole);  // where its vector begins
  int64_t j = 0;
  for (; j < mixed; j += lanes<T>) before.add(not_below<T>(load(x + j), label));
  if (y >= 0 && j < whole) {
    before.add(before_label<T>(load(x + j), label, y - j));
    j += lanes<T>;
  }
  for (; j < whole; j += lanes<T>) before.add(above<T>(load(x + j), label));
  if (j < count)
    before.add(before_label<T>(load_first(x + j, count - j, own), label, y - j) & first_lanes<T>(count - j));
  return before.total();
}

// `of_one`: all classes are in one vector.
template <class E, bool of_one>
LTK_INLINE bool row_is_right(const E* x, int64_t classes, int64_t y, int64_t top_k) {
  using T = Compared<E>;
  const T own = T(to_float(x[y]));
  int64_t before = 0;
  if (__builtin_expect(own != own, false)) {
    for (int64_t j = 0; j < y && before < top_k; ++j) before += comes_before(T(to_float(x[j])), true, own);
    return before < top_k;
  }
  alignas(64) T scratch[std::is_same_v<E, T> ? 1 : block];
  if constexpr (of_one) {
    const Vec<T> v = load_first(widened<T>(x, classes, scratch), classes, own);
    Counter<T> found;
    found.add(before_label<T>(v, splat(own), y) & first_lanes<T>(classes));
    return found.total() < top_k;
  }
  // Too short for leaving it to be worth a branch that nothing can predict.
  if (classes <= first_block) return count_before(widened<T>(x, classes, scratch), classes, y, own) < top_k;
  for (int64_t first = 0; first < classes;) {
    const int64_t count = std::min(first == 0 ? first_block : block, classes - first);
    before += count_before(widened<T>(x + first, count, scratch), count, y - first, own);
    if (before >= top_k) return false;
    first += count;
  }
  return true;
}

// Classes side by side: row by row.
template <class E, bool of_one>
void mark_rows(const AccuracyCall& call, const Labels& labels, int64_t first, int64_t count, uint8_t* right) {
  const E* x = static_cast<const E*>(call.input);
  // Copies, which a byte that is written cannot change.
  const Layout layout = call.input_layout;
  const int64_t classes = call.classes, top_k = call.top_k;
  const bool fetches = !of_one && classes * int64_t(sizeof(E)) >= fetched_bytes;
  for (int64_t k = 0; k < count; ++k) {
    if (fetches && k + rows_ahead < count) {
      const E* row = x + layout.offset(first + k + rows_ahead);
      for (int64_t j = 0; j < first_block; j += 64 / int64_t(sizeof(E))) __builtin_prefetch(row + j);
      __builtin_prefetch(row + std::max<int64_t>(0, labels.y[k + rows_ahead]));
    }
    const int64_t y = labels.y[k];
    right[k] = y >= 0 && row_is_right<E, of_one>(x + layout.offset(first + k), classes, y, top_k);
  }
}

// Classes apart, rows side by side (pixels): `count` <= group_rows of them, a lane each, pass together column by
// column.
template <class T>
constexpr int64_t group_rows = 4 * lanes<T>;

template <class E>
void mark_neighbours(const E* x, int64_t stride, int64_t classes, const int64_t* y, int64_t count, int64_t top_k,
                     uint8_t* right) {
  using T = Compared<E>;
  using Lane = std::remove_reference_t<decltype(IntVec<T>{}[0] + 0)>;
  constexpr int64_t rows = group_rows<T>, vectors = rows / lanes<T>;
  alignas(64) T own[rows] = {}, scratch[rows] = {};
  alignas(64) Lane label[rows] = {}, before[rows];
  for (int64_t r = 0; r < count; ++r) {
    label[r] = Lane(std::max<int64_t>(0, y[r]));
    own[r] = T(to_float(x[r + label[r] * stride]));
  }
  Vec<T> of_label[vectors];
  IntVec<T> place[vectors], minus_before[vectors] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    of_label[v] = load(own + v * lanes<T>);
    std::memcpy(&place[v], label + v * lanes<T>, sizeof place[v]);
  }
  for (int64_t j = 0; j < classes; ++j) {
    const E* from = x + j * stride;
    for (int64_t r = 0; r < rows; r += 64 / int64_t(sizeof(E))) __builtin_prefetch(from + rows + r);
    const T* column = widened<T>(from, count, scratch);
    if (std::is_same_v<E, T> && count < rows) {
      std::copy_n(column, count, scratch);
      column = scratch;
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> value = load(column + v * lanes<T>);
      minus_before[v] += ~(value <= of_label[v]) | (~(value < of_label[v]) & (place[v] > Lane(j)));
    }
  }
  std::memcpy(before, minus_before, sizeof before);
  for (int64_t r = 0; r < count; ++r) {
    int64_t found = -int64_t(before[r]);
    if (__builtin_expect(own[r] != own[r], false)) {
      found = 0;
      for (int64_t j = 0; j < label[r]; ++j) found += comes_before(T(to_float(x[r + j * stride])), true, own[r]);
    }
    right[r] = y[r] >= 0 && found < top_k;
  }
}

// Classes apart, rows anywhere: a tile of rows passes column by column.
template <class E>
void mark_scattered(const AccuracyCall& call, const Labels& labels, int64_t first, int64_t count, uint8_t* right) {
  using T = Compared<E>;
  const E* x = static_cast<const E*>(call.input);
  const int64_t stride = call.input_layout.stride_class;
  int64_t offset[tile_rows], label[tile_rows], before[tile_rows];
  T own[tile_rows];
  for (int64_t r = 0; r < count; ++r) {
    const bool counts = labels.y[r] >= 0;
    offset[r] = call.input_layout.offset(first + r);
    label[r] = counts ? labels.y[r] : 0;
    before[r] = counts ? 0 : call.top_k;  // wrong already
    own[r] = T(to_float(x[offset[r] + label[r] * stride]));
  }
  for (int64_t j = 0; j < call.classes; ++j)
    for (int64_t r = 0; r < count; ++r)
      before[r] += j != label[r] && comes_before(T(to_float(x[offset[r] + j * stride])), j < label[r], own[r]);
  for (int64_t r = 0; r < count; ++r) right[r] = before[r] < call.top_k;
}

template <class E>
void mark_strided(const AccuracyCall& call, const Labels& labels, int64_t first, int64_t count, uint8_t* right) {
  const Layout layout = call.input_layout;
  const bool of_groups = layout.inner > 1;
  if ((of_groups ? layout.stride_inner : layout.stride_outer) != 1 ||
      call.classes > std::numeric_limits<int32_t>::max())
    return mark_scattered<E>(call, labels, first, count, right);
  for (int64_t k = 0; k < count;) {
    const int64_t row = first + k, in_group = of_groups ? layout.inner - row % layout.inner : count;
    const int64_t rows = std::min({group_rows<Compared<E>>, count - k, in_group});
    const E* x = static_cast<const E*>(call.input) + layout.offset(row);
    mark_neighbours<E>(x, layout.stride_class, call.classes, labels.y + k, rows, call.top_k, right + k);
    k += rows;
  }
}

template <class E>
void mark_logits(const AccuracyCall& call, const Labels& labels, int64_t first, int64_t count, uint8_t* right) {
  if (call.input_layout.stride_class != 1 && call.classes != 1)
    return mark_strided<E>(call, labels, first, count, right);
  if (call.classes <= lanes<Compared<E>>) return mark_rows<E, true>(call, labels, first, count, right);
  mark_rows<E, false>(call, labels, first, count, right);
}

void mark_predicted(const AccuracyCall& call, const Labels& labels, int64_t first, int64_t count, uint8_t* right) {
  int64_t predicted[tile_rows];
  read_predicted(call, first, count, predicted);
  for (int64_t k = 0; k < count; ++k) right[k] = labels.y[k] >= 0 && predicted[k] == labels.y[k];
}

void mark(const AccuracyCall& call, int64_t begin, int64_t end, uint8_t* right) {
  for (int64_t first = begin; first < end; first += tile_rows) {
    const int64_t count = std::min(tile_rows, end - first);
    const Labels labels(call, first, count);
    switch (call.input_type) {
      case ElementType::f64:
        mark_logits<double>(call, labels, first, count, right + first);
        break;
      case ElementType::f32:
        mark_logits<float>(call, labels, first, count, right + first);
        break;
      case ElementType::bf16:
        mark_logits<BFloat16>(call, labels, first, count, right + first);
        break;
      case ElementType::f16:
        mark_logits<Float16>(call, labels, first, count, right + first);
        break;
      default:
        mark_predicted(call, labels, first, count, right + first);
    }
  }
}

}  // namespace

extern const AccuracyCountsTable accuracy_counts_table;
const AccuracyCountsTable accuracy_counts_table = {in_range, mark, add};

}  // namespace ltk::LTK_ISA
