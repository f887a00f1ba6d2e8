// Registers the CUDA kernels of binary_cross_entropy with PyTorch. Nothing here waits for the device: see cuda.cpp.
#include <tuple>
#include <type_traits>

#include "bindings/binary_cross_entropy_arguments.h"
#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "cuda/binary_cross_entropy.h"

namespace {

using namespace ltk::bindings;
using ltk::cuda::BinaryCall;
using ltk::cuda::Reduction;

template <class T>
BinaryCall<T> prepare(const BinaryArguments& a, const Tensor& tickets, const Tensor& error_word) {
  check_sizes<T>(a);
  BinaryCall<T> call{};
  call.classes = a.input.size(1);
  call.rows = a.input.numel() / call.classes;
  call.input = a.input.const_data_ptr();
  call.input_layout = layout(a.input);
  call.target = a.target.const_data_ptr();
  call.target_type = element_type(a.target);
  call.target_layout = ltk::is_floating(call.target_type) ? layout(a.target) : row_layout(a.target);
  call.ignore_index = a.ignore_index;
  call.background_index = a.background_index;
  call.uniform_scale = T(1);
  call.weight = data<T>(a.weight);
  call.pos_weight = data<T>(a.pos_weight);
  call.neg_weight = data<T>(a.neg_weight);
  call.keep[0] = data<T>(a.foreground_keep);
  call.keep[1] = data<T>(a.background_keep);
  call.row_weight = data<T>(a.sample_weight);
  call.terms = a.options<T>();
  call.draw_step = a.draw_step ? static_cast<const int64_t*>(a.draw_step->const_data_ptr()) : nullptr;
  call.seed = uint64_t(a.seed);
  call.column_sums = a.column_sums;
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const BinaryArguments& a, int64_t reduction, bool empty_zero, const Tensor& tickets,
                                   const Tensor& error_word) {
  const Place place(a.input);
  BinaryCall<T> call = prepare<T>(a, tickets, error_word);
  call.reduction = static_cast<Reduction>(reduction);
  call.empty_zero = empty_zero;
  constexpr ScalarType type = type_of<T>();
  Tensor state = allocate({a.states()}, {1}, type, place.device);
  call.state = static_cast<T*>(state.mutable_data_ptr());
  Tensor loss = allocate_loss(&call, a.input, place.device);
  check(ltk::cuda::plan_binary<E, T>(&call));
  if (tickets.numel() < 1 + call.chunks) fail("expected a ticket, and one for every chunk of columns");
  // Given back while the kernel still runs: whoever gets this memory next uses it on the same stream, later.
  Tensor sums = allocate({2 * call.row_blocks}, {1}, ScalarType::Double, place.device);
  Tensor columns = allocate({2 * call.splits * call.classes}, {1}, type, place.device);
  call.partials = static_cast<double*>(sums.mutable_data_ptr());
  call.column_partials = static_cast<T*>(columns.mutable_data_ptr());
  check(ltk::cuda::binary_forward<E, T>(call, place.stream()));
  return {loss, state};
}

template <class E, class T>
Tensor backward(const BinaryArguments& a, const Tensor& grad, const Tensor& state, bool need_input, bool inplace,
                const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  BinaryCall<T> call = prepare<T>(a, tickets, error_word);
  constexpr ScalarType type = type_of<T>();
  set_upstream(&call, a.input, grad, state, a.states());
  if (!need_input) return allocate({0}, {1}, type, place.device);
  Tensor d_input = inplace ? a.input : dense_like(a.input);
  call.gradient = d_input.mutable_data_ptr();
  call.gradient_layout = layout(d_input);
  check(ltk::cuda::binary_backward<E, T>(call, place.stream()));
  return d_input;
}

std::tuple<Tensor, Tensor> binary_cross_entropy_forward(LTK_BINARY_CROSS_ENTROPY_PARAMETERS, Tensor tickets,
                                                        Tensor error_word) {
  const BinaryArguments a LTK_BINARY_CROSS_ENTROPY_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, reduction, empty_zero, tickets,
                                                                             error_word);
  });
}

Tensor binary_cross_entropy_backward(Tensor grad, Tensor state, LTK_BINARY_CROSS_ENTROPY_PARAMETERS, bool need_input,
                                     bool inplace, Tensor tickets, Tensor error_word) {
  const BinaryArguments a LTK_BINARY_CROSS_ENTROPY_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, grad, state, need_input, inplace,
                                                                              tickets, error_word);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("binary_cross_entropy_forward(" LTK_BINARY_CROSS_ENTROPY_ARGUMENTS
        ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def("binary_cross_entropy_backward(Tensor grad, Tensor state, " LTK_BINARY_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool inplace, Tensor tickets, Tensor error_word) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("binary_cross_entropy_forward", TORCH_BOX(&binary_cross_entropy_forward));
  m.impl("binary_cross_entropy_backward", TORCH_BOX(&binary_cross_entropy_backward));
}
