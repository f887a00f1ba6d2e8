// Chooses the instruction set at run time.
#include <atomic>

#include "cpu/kernels.h"

namespace ltk {

// Each hot path's csrc/cpu/kernels_*.cpp defines its table once per instruction set.
#define LTK_KERNELS_OF(ISA)                                        \
  namespace ISA {                                                  \
  extern const AccuracyCountsTable accuracy_counts_table;          \
  extern const AggregateTable aggregate_experts_table;             \
  extern const BinaryCrossEntropyTable binary_cross_entropy_table; \
  extern const CrossEntropyTable cross_entropy_table;              \
  extern const DistillationTable distillation_table;               \
  extern const ExpertCrossEntropyTable expert_cross_entropy_table; \
  extern const LadeTable lade_table;                               \
  extern const RowCrossEntropyTable row_cross_entropy_table;       \
  extern const SamplingTable sampling_table;                       \
  constexpr Kernels table{accuracy_counts_table,                   \
                          aggregate_experts_table,                 \
                          binary_cross_entropy_table,              \
                          cross_entropy_table,                     \
                          distillation_table,                      \
                          expert_cross_entropy_table,              \
                          lade_table,                              \
                          row_cross_entropy_table,                 \
                          sampling_table};                         \
  }
#if defined(__x86_64__)
LTK_KERNELS_OF(avx512)
LTK_KERNELS_OF(avx2)
#endif
LTK_KERNELS_OF(portable)

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
