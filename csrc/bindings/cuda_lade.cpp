// Registers the CUDA kernels of LADE with PyTorch. Nothing here waits for the device: see cuda.cpp.
#include <tuple>
#include <type_traits>

#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "bindings/lade_arguments.h"
#include "cuda/lade.h"

namespace {

using namespace ltk::bindings;
using ltk::cuda::LadeCall;

template <class T>
LadeCall<T> prepare(const LadeArguments& a, const Tensor& tickets, const Tensor& error_word) {
  check_sizes<T>(a);
  LadeCall<T> call{};
  call.classes = a.classes();
  call.rows = a.rows();
  call.input = a.input.const_data_ptr();
  call.input_layout = layout(a.input);
  call.target = a.target.const_data_ptr();
  call.target_type = element_type(a.target);
  call.target_layout = row_layout(a.target);
  call.ignore_index = a.ignore_index;
  call.uniform_scale = T(1);
  call.bias = data<T>(a.class_bias);
  call.remine_lambda = T(a.remine_lambda);
  call.strength = T(a.weight);
  call.with_ce = a.with_ce;
  call.prior = static_cast<const T*>(a.prior.const_data_ptr());
  call.class_offset = data<T>(a.class_offset);
  call.row_offset = data<T>(a.row_offset);
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const LadeArguments& a, const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  LadeCall<T> call = prepare<T>(a, tickets, error_word);
  constexpr ScalarType type = type_of<T>();
  Tensor state = allocate({a.states()}, {1}, type, place.device), loss = allocate({}, {}, type, place.device);
  call.state = static_cast<T*>(state.mutable_data_ptr());
  call.loss = static_cast<T*>(loss.mutable_data_ptr());
  check(ltk::cuda::plan_lade<E, T>(&call));
  if (tickets.numel() < 1 + call.grid.chunks) fail("expected a ticket, and one for every chunk of columns");
  // Given back while the kernel still runs: whoever gets this memory next uses it on the same stream, later.
  Tensor sums = allocate({call.partial_sums()}, {1}, ScalarType::Double, place.device);
  Tensor columns = allocate({4 * call.grid.splits * call.classes}, {1}, type, place.device);
  call.partials = static_cast<double*>(sums.mutable_data_ptr());
  call.column_partials = static_cast<T*>(columns.mutable_data_ptr());
  check(ltk::cuda::lade_forward<E, T>(call, place.stream()));
  return {loss, state};
}

template <class E, class T>
Tensor backward(const LadeArguments& a, const Tensor& grad, const Tensor& state, bool need_input, bool inplace,
                const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  LadeCall<T> call = prepare<T>(a, tickets, error_word);
  constexpr ScalarType type = type_of<T>();
  if (state.numel() != a.states() || state.scalar_type() != type || !state.is_contiguous() ||
      grad.scalar_type() != type || grad.dim() != 0)
    fail("grad or state are not those of these logits");
  if (!need_input) return allocate({0}, {1}, type, place.device);
  call.state = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
  call.upstream = static_cast<const T*>(grad.const_data_ptr());
  Tensor d_input = inplace ? a.input : dense_like(a.input);
  call.gradient = d_input.mutable_data_ptr();
  call.gradient_layout = layout(d_input);
  check(ltk::cuda::lade_backward<E, T>(call, place.stream()));
  return d_input;
}

std::tuple<Tensor, Tensor> lade_forward(Tensor input, Tensor target, Tensor prior, OptionalTensor class_bias,
                                        OptionalTensor class_offset, OptionalTensor row_offset, int64_t ignore_index,
                                        int64_t, double remine_lambda, double weight, bool with_ce, Tensor tickets,
                                        Tensor error_word) {
  const LadeArguments a{input,      target,       prior,         class_bias, class_offset,
                        row_offset, ignore_index, remine_lambda, weight,     with_ce};
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, tickets, error_word);
  });
}

Tensor lade_backward(Tensor grad, Tensor state, Tensor input, Tensor target, Tensor prior, OptionalTensor class_bias,
                     OptionalTensor class_offset, OptionalTensor row_offset, int64_t ignore_index, int64_t,
                     double remine_lambda, double weight, bool with_ce, bool need_input, bool inplace, Tensor tickets,
                     Tensor error_word) {
  const LadeArguments a{input,      target,       prior,         class_bias, class_offset,
                        row_offset, ignore_index, remine_lambda, weight,     with_ce};
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, grad, state, need_input, inplace,
                                                                              tickets, error_word);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("lade_forward(" LTK_LADE_ARGUMENTS ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def("lade_backward(Tensor grad, Tensor state, " LTK_LADE_ARGUMENTS
        ", bool need_input, bool inplace, Tensor tickets, Tensor error_word) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("lade_forward", TORCH_BOX(&lade_forward));
  m.impl("lade_backward", TORCH_BOX(&lade_backward));
}
