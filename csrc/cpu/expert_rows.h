// The logits of several experts, a few samples at a time. Included by the kernels_*.cpp files only.
#pragma once

#include <algorithm>

#include "cpu/row_memory.h"
#include "cpu/sweeps.h"

namespace ltk::LTK_ISA {
namespace {

// Samples that pass together: short ones until their logits fill L1; where classes are strided, so many that
// neighbouring samples share cache lines.
static inline int64_t samples_a_tile(int64_t experts, int64_t classes, bool strided) {
  return strided ? max_tile : std::clamp<int64_t>(short_tile / (experts * classes), 1, max_tile);
}

// out = sum_k c_k (x_k - shift_k) - less, over `count` rows, without shifts for null; up to four at a time, whose
// number the compiler knows.
template <int at_once, bool shifted, class T>
LTK_INLINE void add_rows(const T* const* x, const T* c, const T* shift, int64_t classes, T less, bool onto, T* out) {
  Vec<T> factor[at_once], from[at_once];
  for (int k = 0; k < at_once; ++k) {
    factor[k] = splat(c[k]);
    if (shifted) from[k] = splat(shift[k]);
  }
  const auto write = [&](auto start) {
    sweep<T>(0, classes, [&](int64_t j, auto load, auto store) {
      Vec<T> total = start(j, load);
      for (int k = 0; k < at_once; ++k) {
        Vec<T> v = load(x[k] + j, T(0));
        if (shifted) v = v - from[k];
        total = multiply_add<T>(factor[k], v, total);
      }
      store(out + j, total);
    });
  };
  if (onto)
    write([out](int64_t j, auto load) { return load(out + j, T(0)); });
  else
    write([less](int64_t, auto) { return splat(-less); });
}

template <bool shifted, class T>
void combine_rows_of(const T* const* x, const T* c, const T* shift, int64_t count, int64_t classes, T less, T* out) {
  bool onto = false;
  for (; count > 4; count -= 4, x += 4, c += 4, shift += shifted ? 4 : 0, onto = true)
    add_rows<4, shifted>(x, c, shift, classes, less, onto, out);
  switch (count) {
    case 4:
      return add_rows<4, shifted>(x, c, shift, classes, less, onto, out);
    case 3:
      return add_rows<3, shifted>(x, c, shift, classes, less, onto, out);
    case 2:
      return add_rows<2, shifted>(x, c, shift, classes, less, onto, out);
    default:
      return add_rows<1, shifted>(x, c, shift, classes, less, onto, out);
  }
}

template <class T>
void combine_rows(const T* const* x, const T* c, const T* shift, int64_t count, int64_t classes, T less, T* out) {
  if (shift != nullptr) return combine_rows_of<true>(x, c, shift, count, classes, less, out);
  return combine_rows_of<false>(x, c, shift, count, classes, less, out);
}

}  // namespace
}  // namespace ltk::LTK_ISA
