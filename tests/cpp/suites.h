// The tests of each instruction set.
#pragma once

#include <cstdint>

namespace test {

struct SimdSuite {
  void (*exponentials)();
  void (*conversions)();
};

void kernels(uint64_t seed);
void sampling(uint64_t seed);

}  // namespace test

namespace ltk {
#if defined(__x86_64__)
namespace avx512 {
extern const test::SimdSuite simd_suite;
}
namespace avx2 {
extern const test::SimdSuite simd_suite;
}
#endif
namespace portable {
extern const test::SimdSuite simd_suite;
}
}  // namespace ltk
