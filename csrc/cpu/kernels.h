// The kernels of all hot paths by instruction set.
#pragma once

#include "cpu/accuracy_counts.h"
#include "cpu/aggregate_experts.h"
#include "cpu/binary_cross_entropy.h"
#include "cpu/cross_entropy.h"
#include "cpu/distillation.h"
#include "cpu/expert_cross_entropy.h"
#include "cpu/lade.h"
#include "cpu/row_cross_entropy.h"
#include "cpu/sampling.h"

namespace ltk {

struct Kernels {
  const AccuracyCountsTable& accuracy_counts;
  const AggregateTable& aggregate_experts;
  const BinaryCrossEntropyTable& binary_cross_entropy;
  const CrossEntropyTable& cross_entropy_table;
  const DistillationTable& distillation;
  const ExpertCrossEntropyTable& expert_cross_entropy;
  const LadeTable& lade;
  const RowCrossEntropyTable& row_cross_entropy;
  const SamplingTable& sampling;

  template <class T>
  const CrossEntropyKernels<T>& cross_entropy() const {
    if constexpr (sizeof(T) == 4)
      return cross_entropy_table.single;
    else
      return cross_entropy_table.real;
  }
};

// Instruction sets in the order of their speed, as in ltkernels/backends.py.
constexpr int num_instruction_sets = 3;

// The set in use; with 0 <= wanted < num_instruction_sets the one used from now on, -1 if this machine or build lacks
// it.
int select_instruction_set(int wanted);
const Kernels& kernels();

}  // namespace ltk
