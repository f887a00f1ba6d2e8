// The types of logits in memory: one at a time, and 16 bytes at a time.
#pragma once

#include <cstring>

#include "cuda/simt.h"

namespace ltk::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
LTK_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

LTK_DEVICE float widen(float x) { return x; }
LTK_DEVICE double widen(double x) { return x; }
LTK_DEVICE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
LTK_DEVICE float widen(Float16 x) { return simt::from_float16(x.bits); }

LTK_DEVICE void narrow(float* to, float x) { *to = x; }
LTK_DEVICE void narrow(double* to, double x) { *to = x; }
LTK_DEVICE void narrow(BFloat16* to, float x) { to->bits = simt::to_bfloat16(x); }
LTK_DEVICE void narrow(Float16* to, float x) { to->bits = simt::to_float16(x); }

struct alignas(16) Vector {
  uint32_t words[4];
};

template <class E>
constexpr int width = 16 / int(sizeof(E));  // elements of a Vector

LTK_DEVICE void decode(const Vector& v, float (&x)[4], float) {
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = bit_cast<float>(v.words[k]);
}
LTK_DEVICE void decode(const Vector& v, float (&x)[8], BFloat16) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = bit_cast<float>(v.words[k] << 16);
    x[2 * k + 1] = bit_cast<float>(v.words[k] & 0xffff0000u);
  }
}
LTK_DEVICE void decode(const Vector& v, float (&x)[8], Float16) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = simt::from_float16(uint16_t(v.words[k]));
    x[2 * k + 1] = simt::from_float16(uint16_t(v.words[k] >> 16));
  }
}

LTK_DEVICE Vector encode(const float (&x)[4], float) {
  Vector v;
#pragma unroll
  for (int k = 0; k < 4; ++k) v.words[k] = bit_cast<uint32_t>(x[k]);
  return v;
}
LTK_DEVICE Vector encode(const float (&x)[8], BFloat16) {
  Vector v;
#pragma unroll
  for (int k = 0; k < 4; ++k) v.words[k] = simt::to_bfloat16s(x[2 * k], x[2 * k + 1]);
  return v;
}
LTK_DEVICE Vector encode(const float (&x)[8], Float16) {
  Vector v;
#pragma unroll
  for (int k = 0; k < 4; ++k) v.words[k] = simt::to_float16s(x[2 * k], x[2 * k + 1]);
  return v;
}

// The row's elements as vectors at aligned addresses, wherever the row starts: vector v holds the columns
// first(v) ... first(v) + width - 1, of which the first and the last vector may have some outside the row. Only those
// are read and written element by element, so that 16-byte accesses serve rows of every length.
template <class E>
struct AlignedRow {
  E* row;
  int classes, shift;

  LTK_DEVICE AlignedRow(const void* memory, int64_t offset, int64_t classes)
      : row(static_cast<E*>(const_cast<void*>(memory)) + offset),
        classes(int(classes)),
        shift(int(reinterpret_cast<uintptr_t>(row) % sizeof(Vector) / sizeof(E))) {}

  LTK_DEVICE int first(int v) const { return v * width<E> - shift; }
  LTK_DEVICE int vectors() const { return (classes + shift + width<E> - 1) / width<E>; }
  LTK_DEVICE bool whole(int v) const { return first(v) >= 0 && first(v) + width<E> <= classes; }
  LTK_DEVICE Vector load(int v) const {
    const E* from = row + first(v);
    if (whole(v)) return *reinterpret_cast<const Vector*>(from);
    return load_from(first(v));
  }
  // The columns from `begin` on, wherever they lie; the cache serves what one access of a warp leaves of a line.
  LTK_DEVICE Vector load_from(int begin) const {
    alignas(16) E parts[width<E>];
#pragma unroll
    for (int k = 0; k < width<E>; ++k) {
      const int j = begin + k;
      parts[k] = j >= 0 && j < classes ? row[j] : E{};
    }
    Vector vector;
    std::memcpy(&vector, parts, sizeof vector);
    return vector;
  }
  LTK_DEVICE void store(int v, const float (&x)[width<E>]) const {
    E* to = row + first(v);
    if (whole(v)) {
      simt::store16(to, encode(x, E{}).words);
      return;
    }
#pragma unroll
    for (int k = 0; k < width<E>; ++k) {
      const int j = first(v) + k;
      if (j >= 0 && j < classes) narrow(to + k, x[k]);
    }
  }
};

}  // namespace ltk::cuda
