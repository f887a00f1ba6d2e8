// What sample_indices' bindings of every device share: the op's schema, and its arguments checked and turned into a
// call.
#pragma once

#include "bindings/tensors.h"
#include "common/sampling.h"

#define LTK_SAMPLE_INDICES                                                                                          \
  "sample_indices(Tensor offsets, Tensor members, Tensor? alias_table, Tensor? slots, Tensor? quotas, Tensor? "     \
  "start_at, Tensor? epoch_at, int classes, int groups, int draws, bool distinct, int seed, int epoch, int start, " \
  "int step, int count) -> Tensor"

namespace ltk::bindings {

inline void expect(bool good, const char* what) {
  if (!good) fail(std::string("sample_indices: expected ") + what);
}

// A direct call of the op has been checked by nobody. What would take a pass over a table is trusted: that offsets
// ascend, and that aliases, slots and members are in range.
inline SamplingCall sampling_call(const Tensor& offsets, const Tensor& members, const OptionalTensor& alias_table,
                                  const OptionalTensor& slots, const OptionalTensor& quotas,
                                  const OptionalTensor& start_at, const OptionalTensor& epoch_at, int64_t classes,
                                  int64_t groups, int64_t draws, bool distinct, int64_t seed, int64_t epoch,
                                  int64_t start, int64_t step, int64_t count) {
  const Device device = device_of(offsets);
  const auto is = [&](const Tensor& tensor, ScalarType type) {
    return tensor.scalar_type() == type && tensor.is_contiguous() && device_of(tensor) == device;
  };
  const auto is_number = [&](const OptionalTensor& tensor) {
    return !tensor || (tensor->dim() == 0 && is(*tensor, ScalarType::Long));
  };
  expect(classes >= 1 && classes < int64_t(1) << 31, "1 <= classes < 2^31");
  expect(is(offsets, ScalarType::Long) && (offsets.numel() == 0 || offsets.numel() == classes + 1),
         "offsets: contiguous int64 (classes + 1,) or empty");
  expect(is(members, ScalarType::Int) || is(members, ScalarType::Long),
         "members: contiguous int32 or int64 on the device of offsets");
  expect(offsets.numel() > 0 || members.numel() == 0 || members.numel() == classes,
         "a member for each class where offsets is empty");
  expect(!alias_table || (alias_table->numel() == classes && is(*alias_table, ScalarType::Long)),
         "alias_table: contiguous int64 (classes,) on the device of offsets");
  expect(is_number(start_at) && is_number(epoch_at), "start_at and epoch_at: 0-d int64 on the device of offsets");
  expect(start >= 0 && step >= 1 && count >= 0, "start >= 0, step >= 1 and count >= 0");
  int64_t last = 0;
  expect(count == 0 || !(__builtin_mul_overflow(count - 1, step, &last) || __builtin_add_overflow(last, start, &last)),
         "positions below 2^63");
  expect(slots.has_value() == quotas.has_value(), "slots and quotas together");
  if (groups != 0) {
    expect(groups > 0 && draws >= 1 && draws < int64_t(1) << 31, "groups >= 0 and 1 <= draws < 2^31");
    expect(slots || groups <= classes, "at most a group for each class where slots is missing");
  }
  if (slots) {
    expect(slots->dim() == 2 && slots->size(0) == groups && slots->size(1) == 4 && is(*slots, ScalarType::Int),
           "slots: contiguous int32 (groups, 4) on the device of offsets");
    expect(quotas->numel() == classes && is(*quotas, ScalarType::Int),
           "quotas: contiguous int32 (classes,) on the device of offsets");
  }

  SamplingCall call{};
  if (offsets.numel() > 0) call.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  if (members.numel() > 0) {
    if (members.scalar_type() == ScalarType::Int)
      call.members32 = static_cast<const int32_t*>(members.const_data_ptr());
    else
      call.members64 = static_cast<const int64_t*>(members.const_data_ptr());
  }
  call.classes = classes;
  call.alias_table = data<uint64_t>(alias_table);
  call.dealt = groups > 0;
  call.groups = groups;
  call.draws = draws;
  call.distinct = distinct;
  call.slots = data<Slot>(slots);
  call.quotas = data<int32_t>(quotas);
  call.start = start;
  call.step = step;
  call.count = count;
  call.start_at = data<int64_t>(start_at);
  call.epoch_at = data<int64_t>(epoch_at);
  call.epoch = uint32_t(epoch);
  call.seed = uint64_t(seed);
  return call;
}

}  // namespace ltk::bindings
