// Chooses the instruction set at run time.
#include <atomic>

#include "cpu/cross_entropy.h"

namespace ltk {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

const Kernels* table_of(int set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (set == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512cd")
               ? &avx512::table
               : nullptr;
  if (set == 1)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
               ? &avx2::table
               : nullptr;
#endif
  return set == num_instruction_sets - 1 ? &portable::table : nullptr;
}

int best_set() {
  int set = 0;
  while (table_of(set) == nullptr) ++set;
  return set;
}

std::atomic<int>& current() {
  static std::atomic<int> set{best_set()};
  return set;
}

}  // namespace

int select_instruction_set(int wanted) {
  if (wanted >= 0) {
    if (wanted >= num_instruction_sets || table_of(wanted) == nullptr) return -1;
    current() = wanted;
  }
  return current();
}

const Kernels& kernels() { return *table_of(current()); }

}  // namespace ltk
