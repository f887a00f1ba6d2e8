// Registers accuracy_counts of the CPU core with PyTorch.
#include <algorithm>
#include <vector>

#include "bindings/accuracy_counts_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;
using ltk::AccuracyCall;

// Before anything is added: a call that raises has counted nothing.
void check_labels(const AccuracyCall& call, bool of_labels) {
  for (int64_t row = 0; row < call.rows; ++row) {
    const ltk::CountedLabel label = ltk::counted_label(call, row);
    if (label.ignored) continue;
    if (!label.in_range) fail("value: label out of range in target");
    if (!of_labels) continue;
    const int64_t predicted = ltk::predicted_label(call, row);
    if (predicted < 0 || predicted >= call.classes) fail("value: label out of range in input");
  }
}

void accuracy_counts(Tensor input, Tensor target, Tensor correct, Tensor total, int64_t top_k, int64_t ignore_index) {
  const AccuracyCall call = accuracy_call(input, target, correct, total, top_k, ignore_index);
  const bool of_labels = !ltk::is_floating(call.input_type);
  check_labels(call, of_labels);
  // Threads leave a byte a row, which one of them adds up: N additions beside N C comparisons, and no atomics.
  std::vector<uint8_t> right(of_labels ? 0 : call.rows);
  if (!of_labels) {
    const auto kernel = ltk::kernels().accuracy_counts.mark;
    // Rows a thread takes at least: 64k logits, below which another thread costs more than it does.
    const int64_t grain = std::max<int64_t>(1, 65536 / call.classes);
    torch::stable::parallel_for(0, call.rows, grain,
                                [&](int64_t begin, int64_t end) { kernel(call, begin, end, right.data()); });
  }
  for (int64_t row = 0; row < call.rows; ++row) {
    const ltk::CountedLabel label = ltk::counted_label(call, row);
    if (label.ignored) continue;
    call.total[label.y] += 1;
    call.correct[label.y] += of_labels ? ltk::predicted_label(call, row) == label.y : right[row];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) { m.def("accuracy_counts(" LTK_ACCURACY_COUNTS_ARGUMENTS ") -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) { m.impl("accuracy_counts", TORCH_BOX(&accuracy_counts)); }
