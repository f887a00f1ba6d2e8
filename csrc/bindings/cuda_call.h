// What the bindings of the CUDA losses share: counters and error word, the loss's memory, the upstream gradient.
#pragma once

#include "bindings/cross_entropy_arguments.h"
#include "bindings/cuda_place.h"
#include "cuda/cross_entropy.h"

namespace ltk::bindings {

// See ltkernels/ops/gpu.py.
template <class T>
void set_counters(cuda::Call<T>* call, const Tensor& input, const Tensor& tickets, const Tensor& error_word) {
  if (tickets.numel() < 1 || tickets.scalar_type() != ScalarType::Int || !(device_of(tickets) == device_of(input)) ||
      error_word.scalar_type() != ScalarType::Int || device_of(error_word).type != aoti_torch_device_type_cpu())
    fail("expected int32 tickets on the device and an int32 error word in pinned memory");
  call->tickets = static_cast<int*>(tickets.mutable_data_ptr());
  call->error = static_cast<int*>(error_word.mutable_data_ptr());
}

// Memory for the loss: one number, or one a row.
template <class T>
Tensor allocate_loss(cuda::Call<T>* call, const Tensor& input, const Device& device) {
  constexpr ScalarType type = type_of<T>();
  Tensor loss = call->reduction != cuda::Reduction::none ? allocate({}, {}, type, device)
                : input.dim() == 2 ? allocate({input.size(0)}, {1}, type, device)
                                   : allocate({input.size(0), input.size(2)}, {input.size(2), 1}, type, device);
  call->loss = static_cast<T*>(loss.mutable_data_ptr());
  return loss;
}

// What a backward is given: the gradient of the loss, one number or one a row, and the forward's state.
template <class T>
void set_upstream(cuda::Call<T>* call, const Tensor& input, const Tensor& grad, const Tensor& state, int64_t states) {
  const bool of_rows = grad.dim() == input.dim() - 1 && grad.size(0) == input.size(0) &&
                       (grad.dim() == 1 || grad.size(1) == input.size(2));
  if (state.numel() != states || state.scalar_type() != type_of<T>() || !state.is_contiguous() ||
      grad.scalar_type() != type_of<T>() || !(grad.dim() == 0 || of_rows))
    fail("grad or state are not those of these logits");
  call->state = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
  call->upstream = static_cast<const T*>(grad.const_data_ptr());
  call->upstream_layout = row_layout(grad);
}

}  // namespace ltk::bindings
