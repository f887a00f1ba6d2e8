// Registers accuracy_counts of the CPU core with PyTorch.
#include <algorithm>
#include <vector>

#include "bindings/accuracy_counts_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;
using ltk::AccuracyCall;

void accuracy_counts(Tensor input, Tensor target, Tensor correct, Tensor total, int64_t top_k, int64_t ignore_index) {
  const AccuracyCall call = accuracy_call(input, target, correct, total, top_k, ignore_index);
  const ltk::AccuracyCountsTable& kernels = ltk::kernels().accuracy_counts;
  if (!kernels.in_range(call)) fail("value: label out of range");
  // Threads leave a byte a row, which one of them adds up: N additions beside N C comparisons, and no atomics.
  std::vector<uint8_t> right(call.rows);
  // Rows a thread takes at least: 64k logits, below which another thread costs more than it does.
  const int64_t grain = std::max<int64_t>(1, 65536 / (ltk::is_floating(call.input_type) ? call.classes : 1));
  torch::stable::parallel_for(0, call.rows, grain,
                              [&](int64_t begin, int64_t end) { kernels.mark(call, begin, end, right.data()); });
  kernels.add(call, right.data());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) { m.def("accuracy_counts(" LTK_ACCURACY_COUNTS_ARGUMENTS ") -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) { m.impl("accuracy_counts", TORCH_BOX(&accuracy_counts)); }
