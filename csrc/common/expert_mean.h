// What a mean of several experts is of, and what its weights depend on: ltkernels/ops/options.py.
#pragma once

#include <cstdint>

namespace ltk {

enum class AggregateMode : int64_t { logits, probs, log_probs };
enum class ExpertWeights : int64_t { equal, expert, sample, classes };

}  // namespace ltk
