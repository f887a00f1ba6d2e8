// A random permutation of [0, n) without a table: where an element goes is computed from 128 random bits alone.
//
// Up to 16 elements, all n! permutations have the same probability: they are a product of transpositions (Fisher and
// Yates), whose partners are the digits of a fraction of 64 bits in bases n, n - 1, ..., 2. Beyond, a Feistel network
// shuffles the smallest power of two that holds n, and what lands outside [0, n) goes through again until it lands
// inside (cycle walking: fewer than 2 passes are expected). Twelve rounds: with eight, triples of elements of 17 and 24
// are visibly dependent, with ten and twelve they are not (tests/test_permutation.py).
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace ltk {

constexpr int permutation_rounds = 12;
constexpr int64_t small_permutation = 16;

// The high half of the product of 64-bit numbers.
LTK_HOST_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return uint64_t((unsigned __int128)a * b >> 64);
#endif
}

// Bits of a number that is not 0.
LTK_HOST_DEVICE int bit_width(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(int64_t(x));
#else
  return 64 - __builtin_clzll(x);
#endif
}

// `bits` (1 to 31) random bits of a value under a key.
LTK_HOST_DEVICE uint32_t mixed_bits(uint32_t value, uint32_t key, int bits) {
  uint32_t x = (value ^ key) * 0x85EBCA6Bu;
  x ^= x >> 16;
  x *= 0xC2B2AE35u;
  return x >> (32 - bits);
}

// The image of x in the permutation of [0, n) that `key` names; 0 <= x < n <= 2^62.
LTK_HOST_DEVICE int64_t permuted(int64_t x, int64_t n, const PhiloxBlock& key) {
  if (n <= small_permutation) {
    uint64_t fraction = uint64_t(key.words[1]) << 32 | key.words[0];
    for (int64_t last = n - 1; last > 0; --last) {
      const int64_t partner = int64_t(multiply_high(fraction, uint64_t(last + 1)));
      fraction *= uint64_t(last + 1);
      x = x == last ? partner : x == partner ? last : x;
    }
    return x;
  }
  const int bits = bit_width(uint64_t(n - 1));
  const int low_bits = bits / 2, high_bits = bits - low_bits;
  uint32_t low = uint32_t(x & ((int64_t(1) << low_bits) - 1)), high = uint32_t(x >> low_bits);
  do {
    for (int round = 0; round < permutation_rounds; round += 2) {
      const uint32_t shift = uint32_t(round / 4) * 0x9E3779B9u;  // four words of key for twelve rounds
      high ^= mixed_bits(low, key.words[round % 4] + shift, high_bits);
      low ^= mixed_bits(high, key.words[round % 4 + 1] + shift, low_bits);
    }
    x = int64_t(high) << low_bits | low;
  } while (x >= n);
  return x;
}

}  // namespace ltk
