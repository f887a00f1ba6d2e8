// Arrays of integers of any type, stride and byte order, read in blocks that fit in the first-level cache: what comes
// after reading is there once, for all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ltk {

constexpr int64_t block_size = 1024;

struct Integers {
  const char* data;
  int64_t size;
  int64_t stride;  // in bytes
  int bytes;       // 1, 2, 4 or 8
  bool is_signed;
  bool swapped;  // not this machine's byte order
};

inline uint8_t swapped_bytes(uint8_t x) { return x; }
inline uint16_t swapped_bytes(uint16_t x) { return __builtin_bswap16(x); }
inline uint32_t swapped_bytes(uint32_t x) { return __builtin_bswap32(x); }
inline uint64_t swapped_bytes(uint64_t x) { return __builtin_bswap64(x); }

// An integer as Out, uint32_t or uint64_t; one that does not fit, as one below 0, becomes a number above every limit.
template <class Out, class T>
Out saturated(T value) {
  const uint64_t bits = uint64_t(int64_t(value));
  if constexpr (sizeof(Out) == 8)
    return bits;
  else
    return uint32_t(bits) | (uint32_t(bits >> 32) != 0 ? ~uint32_t(0) : 0);
}

// The elements of type T at first, first + 1, ... or, if `at` is given, at the positions at[0], at[1], ...
template <class T, class Out>
void read_as(const Integers& from, int64_t first, const uint64_t* at, int64_t count, Out* out) {
  const char* start = from.data + first * from.stride;
  if (!at && !from.swapped && from.stride == sizeof(T)) {
    uint64_t high = 0;  // not 0 if a block has a number that does not fit: the usual one is only copied
    for (int64_t i = 0; i < count; ++i) {
      T value;
      std::memcpy(&value, start + i * int64_t(sizeof(T)), sizeof(T));  // it need not be aligned
      out[i] = Out(value);
      high |= uint64_t(int64_t(value)) >> 32;
    }
    if (sizeof(Out) == 8 || high == 0) return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::make_unsigned_t<T> bits;
    std::memcpy(&bits, at ? from.data + int64_t(at[i]) * from.stride : start + i * from.stride, sizeof(T));
    out[i] = saturated<Out>(T(from.swapped ? swapped_bytes(bits) : bits));
  }
}

template <class Out>
void read_block(const Integers& from, int64_t first, const uint64_t* at, int64_t count, Out* out) {
  switch (from.bytes * 2 + from.is_signed) {
    case 2:
      return read_as<uint8_t>(from, first, at, count, out);
    case 3:
      return read_as<int8_t>(from, first, at, count, out);
    case 4:
      return read_as<uint16_t>(from, first, at, count, out);
    case 5:
      return read_as<int16_t>(from, first, at, count, out);
    case 8:
      return read_as<uint32_t>(from, first, at, count, out);
    case 9:
      return read_as<int32_t>(from, first, at, count, out);
    case 16:
      return read_as<uint64_t>(from, first, at, count, out);
    default:
      return read_as<int64_t>(from, first, at, count, out);
  }
}

}  // namespace ltk
