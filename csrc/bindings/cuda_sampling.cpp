// Registers sample_indices of the CUDA kernels with PyTorch. Nothing here waits for the device: start_at and epoch_at
// are read by the kernel, and what only a look into the tables would show is trusted.
#include "bindings/cuda_place.h"
#include "bindings/sampling_arguments.h"
#include "cuda/sampling.h"

namespace {

using namespace ltk::bindings;

Tensor sample_indices(Tensor offsets, Tensor members, OptionalTensor alias_table, OptionalTensor slots,
                      OptionalTensor quotas, OptionalTensor start_at, OptionalTensor epoch_at, int64_t classes,
                      int64_t groups, int64_t draws, bool distinct, int64_t seed, int64_t epoch, int64_t start,
                      int64_t step, int64_t count) {
  ltk::SamplingCall call = sampling_call(offsets, members, alias_table, slots, quotas, start_at, epoch_at, classes,
                                         groups, draws, distinct, seed, epoch, start, step, count);
  const Place place(offsets);
  Tensor indices = allocate({count}, {1}, ScalarType::Long, place.device);
  call.out = static_cast<int64_t*>(indices.mutable_data_ptr());
  check(ltk::cuda::sample_indices(call, place.stream()));
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) { m.def(LTK_SAMPLE_INDICES); }

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) { m.impl("sample_indices", TORCH_BOX(&sample_indices)); }
