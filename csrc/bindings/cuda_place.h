// Where the bindings of the CUDA kernels launch them: the device and the stream of a call, and the dispatch key that
// they serve. With LTK_EMULATE the kernels run on the CPU and serve CPU tensors, for tests.
#pragma once

#include <string>

#include "bindings/tensors.h"

#if defined(LTK_EMULATE)
  #define LTK_CUDA_KEY CPU
#else
  #define LTK_CUDA_KEY CUDA
// Of the stable shim too, but declared only for programs that link CUDA torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace ltk::bindings {

inline void check(const char* error) {
  if (error != nullptr) fail(std::string("CUDA: ") + error);
}

// The device and the stream of a call.
struct Place {
  Device device;
#if defined(LTK_EMULATE)
  explicit Place(const Tensor& tensor) : device(device_of(tensor)) {}
  void* stream() const { return nullptr; }
#else
  torch::stable::accelerator::DeviceGuard guard;
  explicit Place(const Tensor& tensor) : device(device_of(tensor)), guard(device.index) {}
  void* stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
    return stream;
  }
#endif
};

}  // namespace ltk::bindings
