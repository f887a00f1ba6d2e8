// Registers accuracy_counts of the CUDA kernels with PyTorch. Nothing here waits for the device: labels are looked at
// by the kernel, which leaves out those it cannot count and writes a word of pinned memory.
#include "bindings/accuracy_counts_arguments.h"
#include "bindings/cuda_place.h"
#include "cuda/accuracy_counts.h"

namespace {

using namespace ltk::bindings;

void accuracy_counts(Tensor input, Tensor target, Tensor correct, Tensor total, int64_t top_k, int64_t ignore_index,
                     Tensor error_word) {
  ltk::cuda::AccuracyLaunch call{};
  static_cast<ltk::AccuracyCall&>(call) = accuracy_call(input, target, correct, total, top_k, ignore_index);
  if (error_word.numel() != 1 || error_word.scalar_type() != ScalarType::Int ||
      device_of(error_word).type != aoti_torch_device_type_cpu())
    fail("accuracy_counts: expected an int32 error word in pinned memory");
  call.error = static_cast<int*>(error_word.mutable_data_ptr());
  const Place place(input);
  check(ltk::cuda::accuracy_counts(call, place.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("accuracy_counts(" LTK_ACCURACY_COUNTS_ARGUMENTS ", Tensor error_word) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) { m.impl("accuracy_counts", TORCH_BOX(&accuracy_counts)); }
