// Registers sample_indices of the CPU core with PyTorch.
#include <atomic>

#include "bindings/sampling_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

// Indices that a thread takes at least: some 50 us, below which another thread costs more than it does.
int64_t grain(const ltk::SamplingCall& call) { return call.dealt ? 1024 : 16384; }

Tensor sample_indices(Tensor offsets, Tensor members, OptionalTensor alias_table, OptionalTensor slots,
                      OptionalTensor quotas, OptionalTensor start_at, OptionalTensor epoch_at, int64_t classes,
                      int64_t groups, int64_t draws, bool distinct, int64_t seed, int64_t epoch, int64_t start,
                      int64_t step, int64_t count) {
  ltk::SamplingCall call = sampling_call(offsets, members, alias_table, slots, quotas, start_at, epoch_at, classes,
                                         groups, draws, distinct, seed, epoch, start, step, count);
  if (call.offsets) {
    const int64_t of_classes = call.offsets[classes];
    expect(call.offsets[0] == 0 && of_classes >= 0 && (members.numel() == 0 || members.numel() == of_classes),
           "offsets from 0 to the number of members");
  }
  if (call.start_at) {
    int64_t last = 0;
    expect(!__builtin_add_overflow(call.start, *call.start_at, &call.start) && call.start >= 0 &&
               (count == 0 || !__builtin_add_overflow(call.start, (count - 1) * step, &last)),
           "positions from 0 to below 2^63");
  }
  if (call.epoch_at) call.epoch += uint32_t(*call.epoch_at);

  Tensor indices = allocate({count}, {1}, ScalarType::Long, device_of(offsets));
  call.out = static_cast<int64_t*>(indices.mutable_data_ptr());
  std::atomic<bool> good{true};
  const auto kernel = ltk::kernels().sampling.sample;
  torch::stable::parallel_for(0, count, grain(call), [&](int64_t begin, int64_t end) {
    if (!kernel(call, begin, end)) good = false;
  });
  if (!good) fail("sample_indices: a class without members came");
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) { m.def(LTK_SAMPLE_INDICES); }

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) { m.impl("sample_indices", TORCH_BOX(&sample_indices)); }
