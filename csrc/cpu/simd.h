// Vectors of one instruction set's width in GNU vector extensions (GCC and Clang, x86 and ARM), with the few operations
// the row kernels need. Included by the kernels_*.cpp files only, which are compiled once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__SSE2__)
  #include <immintrin.h>
#endif

#if defined(__AVX512F__)
  #define LTK_VECTOR_BYTES 64
#elif defined(__AVX2__)
  #define LTK_VECTOR_BYTES 32
#else
  #define LTK_VECTOR_BYTES 16
#endif

// Inlined where the compiler would rather call: for a short row a call costs more than its sweep.
#define LTK_INLINE __attribute__((always_inline)) inline

namespace ltk::LTK_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(LTK_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(LTK_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(LTK_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(LTK_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(LTK_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(LTK_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using IntVec = typename VectorOf<T>::integer;
template <class T>
using BitVec = typename VectorOf<T>::bits;
template <class T>
constexpr int64_t lanes = LTK_VECTOR_BYTES / sizeof(T);

template <class T>
LTK_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // not +, which would turn -0 into 0 and so cannot be left out
}

template <class T>
LTK_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
LTK_INLINE void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The first `count` < lanes elements, the others `fill`.
template <class T>
LTK_INLINE Vec<T> load_first(const T* from, int64_t count, T fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << count) - 1), from);
  } else {
    return (Vec<T>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), (__mmask8)((1u << count) - 1), from);
  }
#else
  Vec<T> v = splat(fill);
  std::memcpy(&v, from, count * sizeof(T));
  return v;
#endif
}

template <class T>
LTK_INLINE void store_first(T* to, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(to, (__mmask8)((1u << count) - 1), (__m512d)v);
  }
#else
  std::memcpy(to, &v, count * sizeof(T));
#endif
}

// a * b + c, rounded once where the instruction set can. Spelled out, and contraction by the compiler turned off
// (setup.py), so that two instantiations of one formula have the same bits.
template <class T>
LTK_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <class T>
LTK_INLINE T multiply_add_one(T a, T b, T c) {
#if defined(__FMA__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger of each pair; `best` where one of them is NaN.
template <class T>
LTK_INLINE Vec<T> maximum(Vec<T> best, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_max_ps((__m512)v, (__m512)best);
  } else {
    return (Vec<T>)_mm512_max_pd((__m512d)v, (__m512d)best);
  }
#else
  return v > best ? v : best;
#endif
}

// Over the lanes, by halving: a fixed order.
template <class T, class Combine>
static inline T reduce_lanes(Vec<T> v, Combine combine) {
  alignas(LTK_VECTOR_BYTES) T a[lanes<T>];
  std::memcpy(a, &v, sizeof v);
  for (int64_t half = lanes<T> / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) a[k] = combine(a[k], a[k + half]);
  return a[0];
}

template <class T>
LTK_INLINE T sum_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  return reduce_lanes<T>(v, [](T a, T b) { return a + b; });
}

template <class T>
LTK_INLINE T max_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  return reduce_lanes<T>(v, [](T a, T b) { return a > b ? a : b; });
}

// e^x for x <= 0 (larger x too, up to the type's range) to 1.2 ulp; exactly 0 below the smallest normal number,
// so for -inf; NaN for NaN. x = n ln 2 + r with |r| <= ln(2) / 2; e^r = 1 + r + r^2 q(r), q by interpolation at
// Chebyshev nodes (relative error of e^r: 1.0e-8 for float, 1.7e-17 for double); adding and subtracting `magic` rounds
// to an integer, which is left in the low mantissa bits, from where a shift makes 2^n; for the smallest x that is the
// bit pattern of 0.
static inline Vec<float> exponential(Vec<float> x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  x = maximum<float>(x, splat(-88.0f));
  const Vec<float> shifted = multiply_add<float>(x, splat(1.44269504f), splat(magic));
  const Vec<float> n = shifted - magic;
  const Vec<float> r = multiply_add<float>(n, splat(2.12194440e-4f), multiply_add<float>(n, splat(-0.693359375f), x));
  Vec<float> q = splat(1.3926213e-3f);
  for (const float coefficient : {8.3632030e-3f, 4.1666554e-2f, 1.6666577e-1f, 0.5f})
    q = multiply_add<float>(q, r, splat(coefficient));
  q = multiply_add<float>(q, r * r, r);
  const Vec<float> power = (Vec<float>)(((BitVec<float>)shifted << 23) + 0x3f800000u);
  return multiply_add<float>(q, power, power);
}

static inline Vec<double> exponential(Vec<double> x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  x = maximum<double>(x, splat(-709.0));
  const Vec<double> shifted = multiply_add<double>(x, splat(1.4426950408889634), splat(magic));
  const Vec<double> n = shifted - magic;
  const Vec<double> r = multiply_add<double>(n, splat(-1.42860682030941723212e-6),
                                             multiply_add<double>(n, splat(-6.93145751953125e-1), x));
  Vec<double> q = splat(2.5100424157005067e-8);
  for (const double coefficient :
       {2.7620138719973996e-7, 2.7557268378684192e-6, 2.4801521190217728e-5, 1.9841269863105969e-4,
        1.3888888917281793e-3, 8.3333333333300513e-3, 4.1666666666623992e-2, 1.6666666666666667e-1, 0.5})
    q = multiply_add<double>(q, r, splat(coefficient));
  q = multiply_add<double>(q, r * r, r);
  const Vec<double> power = (Vec<double>)(((BitVec<double>)shifted << 52) + 0x3ff0000000000000u);
  return multiply_add<double>(q, power, power);
}

// bfloat16 and float16 to float and back, rounding to nearest even.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LTK_INLINE float to_float(BFloat16 h) {
  const uint32_t bits = uint32_t(h.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
#if defined(__F16C__)
LTK_INLINE float to_float(Float16 h) { return _cvtsh_ss(h.bits); }
LTK_INLINE void round_to(Float16* to, float f) { to->bits = _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
// By arithmetic, which does the rounding: a float16 is its 10 mantissa bits times a power of two, and adding a number
// whose last bit is worth that power rounds to it.
LTK_INLINE float to_float(Float16 h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  uint32_t bits = magnitude << 13;
  float f = 0;
  if (magnitude >= 0x7c00) {
    bits |= 0x7f800000;
    std::memcpy(&f, &bits, sizeof f);
  } else if (magnitude <
             0x400) {  // subnormal; as a float of the same bits it would be one too, and the kernels flush those
    f = float(magnitude) * 0x1p-24f;
  } else {
    std::memcpy(&f, &bits, sizeof f);
    f *= 0x1p112f;  // the exponents' biases: 127 - 15
  }
  return sign ? -f : f;
}
LTK_INLINE void round_to(Float16* to, float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    to->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    to->bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    to->bits = sign | uint16_t(shifted - 0x3f000000);
  } else {
    bits += 0xfff + ((bits >> 13) & 1);
    to->bits = sign | uint16_t((bits - 0x38000000) >> 13);
  }
}
#endif
LTK_INLINE float to_float(float f) { return f; }
LTK_INLINE double to_float(double f) { return f; }

LTK_INLINE void round_to(BFloat16* to, float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = f == f ? uint16_t(rounded) : uint16_t(0x7fc0);
}
LTK_INLINE void round_to(float* to, float f) { *to = f; }
LTK_INLINE void round_to(double* to, double f) { *to = f; }

// Whole rows at unit stride; GCC does not vectorise the float16 conversions by itself.
template <class From, class T>
static inline void widen(const From* from, int64_t count, T* to) {
  int64_t j = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == 4 && std::is_same_v<From, Float16>)
    for (; j + 8 <= count; j += 8)
      _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + j))));
#endif
  for (; j < count; ++j) to[j] = T(to_float(from[j]));
}

template <class T, class To>
static inline void narrow(const T* from, int64_t count, To* to) {
  int64_t j = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == 4 && std::is_same_v<To, Float16>)
    for (; j + 8 <= count; j += 8)
      _mm_storeu_si128((__m128i*)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; j < count; ++j) round_to(to + j, from[j]);
}

// log(1 + f) for 1 + f from the smallest normal number up to the largest, to 3 ulp however small f is; NaN for NaN, not
// for infinity. 1 + f = 2^k m with m from sqrt(1/2) to sqrt(2); log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172,
// by its power series. For k = 0, where rounding 1 + f would lose the digits of a small f, m - 1 is f itself.
static inline Vec<float> logarithm_1p(Vec<float> f) {
  const Vec<float> u = 1.0f + f;
  const IntVec<float> k = ((IntVec<float>)u - 0x3f3504f3) >> 23;
  const Vec<float> m = (Vec<float>)((IntVec<float>)u - (IntVec<float>)((BitVec<float>)k << 23));
  const Vec<float> g = k == 0 ? f : m - 1.0f;
  const Vec<float> s = g / (2.0f + g), square = s * s;
  Vec<float> series = splat(2.0f / 9);
  for (const float coefficient : {2.0f / 7, 2.0f / 5, 2.0f / 3})
    series = multiply_add<float>(series, square, splat(coefficient));
  const Vec<float> log_m = multiply_add<float>(series * square, s, s + s);
  const Vec<float> log_u = multiply_add<float>(__builtin_convertvector(k, Vec<float>), splat(0.693147181f), log_m);
  return f == f ? log_u : f;
}

static inline Vec<double> logarithm_1p(Vec<double> f) {
  const Vec<double> u = 1.0 + f;
  const IntVec<double> k = ((IntVec<double>)u - 0x3fe6a09e667f3bcd) >> 52;
  const Vec<double> m = (Vec<double>)((IntVec<double>)u - (IntVec<double>)((BitVec<double>)k << 52));
  const Vec<double> g = k == 0 ? f : m - 1.0;
  const Vec<double> s = g / (2.0 + g), square = s * s;
  Vec<double> series = splat(2.0 / 21);
  for (const double coefficient :
       {2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3})
    series = multiply_add<double>(series, square, splat(coefficient));
  const Vec<double> log_m = multiply_add<double>(series * square, s, s + s);
  const Vec<double> log_u =
      multiply_add<double>(__builtin_convertvector(k, Vec<double>), splat(0.69314718055994531), log_m);
  return f == f ? log_u : f;
}

}  // namespace ltk::LTK_ISA
