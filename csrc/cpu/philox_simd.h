// Philox4x32-10 for as many positions as a vector has 64-bit lanes. The words are the lanes' low halves; what the high
// halves hold does not matter, since the multiplication of 32-bit words reads only the low ones: no round has to mask.
// Included by the kernels_*.cpp files only, which are compiled once per instruction set.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX2__)
namespace ltk::LTK_ISA {

using Words = BitVec<double>;
constexpr int64_t word_lanes = lanes<double>;

// Products of the low halves. The masked forms of this and of the gather are there for GCC, which warns that the others
// read what is not initialised.
LTK_INLINE Words products(Words a, Words b) {
  #if defined(__AVX512F__)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
  #else
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
  #endif
}

LTK_INLINE Words exclusive_or(Words a, Words b, Words c) {
  #if defined(__AVX512F__)
  return (Words)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
  #else
  return a ^ b ^ c;
  #endif
}

LTK_INLINE Words gather(const void* from, Words at) {
  #if defined(__AVX512F__)
  return (Words)_mm512_mask_i64gather_epi64(_mm512_setzero_si512(), 0xff, (__m512i)at, from, 8);
  #else
  return (Words)_mm256_i64gather_epi64(static_cast<const long long*>(from), (__m256i)at, 8);
  #endif
}

LTK_INLINE Words every(uint64_t value) { return value - Words{}; }

// The rounds' keys of a seed.
struct RoundKeys {
  uint64_t even[10], odd[10];
  explicit RoundKeys(uint64_t seed) {
    for (uint32_t round = 0; round < 10; ++round) {
      even[round] = uint32_t(seed) + round * 0x9E3779B9u;
      odd[round] = uint32_t(seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

// The blocks of n vectors of counters, in place: a round waits for the one before, so several vectors take turns.
template <int n>
LTK_INLINE void philox(Words (&c0)[n], Words (&c1)[n], Words (&c2)[n], Words (&c3)[n], const RoundKeys& keys) {
  const Words even_factor = every(0xD2511F53u), odd_factor = every(0xCD9E8D57u);
  #pragma GCC unroll 10
  for (int round = 0; round < 10; ++round)
  #pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      const Words even = products(even_factor, c0[k]), odd = products(odd_factor, c2[k]);
      c0[k] = exclusive_or(odd >> 32, c1[k], every(keys.even[round]));
      c1[k] = odd;
      c2[k] = exclusive_or(even >> 32, c3[k], every(keys.odd[round]));
      c3[k] = even;
    }
}

}  // namespace ltk::LTK_ISA
#endif
