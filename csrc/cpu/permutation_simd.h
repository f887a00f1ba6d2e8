// `permuted` of common/permutation.h for a vector of elements, each with its own n and key. One element at a time is a
// chain of multiplications that wait for one another; eight take hardly longer.
// Included by the kernels_*.cpp files only, which are compiled once per instruction set.
#pragma once

#include "common/permutation.h"
#include "cpu/philox_simd.h"

#if defined(__AVX2__)
namespace ltk::LTK_ISA {

struct WordBlocks {
  Words words[4];  // what stands above the low 32 bits does not matter
};

// Whether a comparison holds in some lane.
LTK_INLINE bool any(Words mask) {
  #if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
  #else
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
  #endif
}

LTK_INLINE Words bit_widths(Words x) {
  #if defined(__AVX512F__)
  return every(64) - (Words)_mm512_maskz_lzcnt_epi64(0xff, (__m512i)x);
  #else
  Words widths;
  for (int64_t lane = 0; lane < word_lanes; ++lane) widths[lane] = 64 - __builtin_clzll(x[lane]);
  return widths;
  #endif
}

// The low `bits` bits, random, of values below 2^32.
LTK_INLINE Words mixed_bits(Words value, Words key, Words shift) {
  const Words low = every(0xFFFFFFFFu);
  Words x = products(value ^ key, every(0x85EBCA6Bu)) & low;
  x = products(x ^ x >> 16, every(0xC2B2AE35u)) & low;
  return x >> shift;
}

// In place; lanes with n <= 16 are permuted, the others stay.
template <int vectors>
LTK_INLINE void permute_few(Words (&x)[vectors], const Words (&n)[vectors], const WordBlocks (&keys)[vectors]) {
  const Words half = every(0xFFFFFFFFu);
  Words high[vectors], low[vectors], size[vectors];
  for (int k = 0; k < vectors; ++k) {
    high[k] = keys[k].words[1] & half, low[k] = keys[k].words[0] & half;
    size[k] = n[k] <= every(small_permutation) ? n[k] : every(0);
  }
  for (uint64_t last = small_permutation - 1; last > 0; --last)
    for (int k = 0; k < vectors; ++k) {
      const Words takes_part = (Words)(every(last) < size[k]);
      const Words below = products(low[k], every(last + 1));
      const Words above = products(high[k], every(last + 1)) + (below >> 32);
      const Words partner = above >> 32;
      const Words swapped = x[k] == every(last) ? partner : x[k] == partner ? every(last) : x[k];
      x[k] = takes_part ? swapped : x[k];
      high[k] = takes_part ? above & half : high[k];
      low[k] = takes_part ? below & half : low[k];
    }
}

// In place; lanes with n > 16 are permuted, the others stay.
template <int vectors>
LTK_INLINE void permute_many(Words (&x)[vectors], const Words (&n)[vectors], const WordBlocks (&keys)[vectors]) {
  Words low[vectors], high[vectors], low_bits[vectors], low_shift[vectors], high_shift[vectors];
  Words inside[vectors];  // all ones where the walk has ended
  for (int k = 0; k < vectors; ++k) {
    const Words bits = bit_widths((n[k] - 1) | every(16));
    low_bits[k] = bits >> 1;
    low_shift[k] = every(32) - low_bits[k], high_shift[k] = every(32) - (bits - low_bits[k]);
    low[k] = x[k] & ((every(1) << low_bits[k]) - 1), high[k] = x[k] >> low_bits[k];
    inside[k] = (Words)(n[k] <= every(small_permutation));
  }
  bool walking = true;
  while (walking) {
    for (int round = 0; round < permutation_rounds; round += 2) {
      const Words shift = every(uint32_t(round / 4) * 0x9E3779B9u);
      for (int k = 0; k < vectors; ++k) high[k] ^= mixed_bits(low[k], keys[k].words[round % 4] + shift, high_shift[k]);
      for (int k = 0; k < vectors; ++k)
        low[k] ^= mixed_bits(high[k], keys[k].words[round % 4 + 1] + shift, low_shift[k]);
    }
    walking = false;
    for (int k = 0; k < vectors; ++k) {
      const Words landed = (high[k] << low_bits[k]) | low[k];
      x[k] = inside[k] ? x[k] : landed;
      inside[k] |= (Words)(landed < n[k]);
      walking |= any(~inside[k]);
    }
  }
}

// Each lane of x, in place, by its permutation of [0, n).
template <int vectors>
LTK_INLINE void permute(Words (&x)[vectors], const Words (&n)[vectors], const WordBlocks (&keys)[vectors]) {
  bool few = false, many = false;
  for (int k = 0; k < vectors; ++k) {
    const Words is_many = (Words)(n[k] > every(small_permutation));
    many |= any(is_many);
    few |= any(~is_many & (Words)(n[k] > every(1)));
  }
  if (few) permute_few(x, n, keys);
  if (many) permute_many(x, n, keys);
}

}  // namespace ltk::LTK_ISA
#endif
