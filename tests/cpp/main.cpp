// `core_test SUITE SET`: runs one suite with one instruction set. Exit status 0: right; 1: wrong, with the first
// difference; 77: this processor does not have the set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"
#include "suites.h"

namespace test {

double Format::decode(uint16_t bits) const {
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = bits & ((1 << mantissa_bits) - 1);
  double value;
  if (exponent == (1 << exponent_bits) - 1)
    value = mantissa == 0 ? HUGE_VAL : NAN;
  else if (exponent == 0)
    value = std::ldexp(mantissa, 1 - bias() - mantissa_bits);
  else
    value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  return bits >> 15 ? -value : value;
}

uint16_t Format::encode(double value) const {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0,
                 infinite = uint16_t(((1 << exponent_bits) - 1) << mantissa_bits);
  value = std::fabs(value);
  if (value == 0) return sign;
  if (std::isnan(value)) return uint16_t(infinite | 1);
  if (std::isinf(value)) return sign | infinite;
  const int exponent = std::max(std::ilogb(value), 1 - bias());
  const long long multiple =
      std::llrint(std::ldexp(value, mantissa_bits - exponent));  // of the last place; ties to even
  // The bits of a number count its multiples: a carry goes into the exponent, and past the last exponent into infinity.
  const long long bits = multiple + ((long long)(exponent + bias() - 1) << mantissa_bits);
  return sign | uint16_t(std::min<long long>(bits, infinite));
}

}  // namespace test

int main(int count, char** arguments) {
  static const char* const sets[] = {"avx512", "avx2", "portable"};
  if (count != 3) test::fail("usage: core_test exponentials|conversions|kernels|sampling avx512|avx2|portable");
  int set = 0;
  while (set < ltk::num_instruction_sets && std::strcmp(sets[set], arguments[2]) != 0) ++set;
  if (ltk::select_instruction_set(set) != set) return 77;
#if defined(__x86_64__)
  const test::SimdSuite* suites[] = {&ltk::avx512::simd_suite, &ltk::avx2::simd_suite, &ltk::portable::simd_suite};
#else
  const test::SimdSuite* suites[] = {nullptr, nullptr, &ltk::portable::simd_suite};
#endif
  const char* suite = arguments[1];
  if (std::strcmp(suite, "exponentials") == 0) {
    suites[set]->exponentials();
  } else if (std::strcmp(suite, "conversions") == 0) {
    suites[set]->conversions();
  } else if (std::strcmp(suite, "kernels") == 0) {
    test::kernels(uint64_t(set));
  } else if (std::strcmp(suite, "sampling") == 0) {
    test::sampling(uint64_t(set));
  } else {
    test::fail("no suite %s", suite);
  }
  std::printf("%s %s: right\n", suite, arguments[2]);
  return 0;
}
