// What the bindings of every op and device share: tensors, devices and memory through the LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace ltk::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("ltkernels: " + what); }

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};
inline Device device_of(const Tensor& tensor) {
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

// Straight through the C shim: an allocation by torch::stable::empty goes through the dispatcher and costs 1 us more.
inline Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                       const Device& device) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device.type, device.index, &handle));
  return Tensor(handle);
}

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace ltk::bindings
