// Registers the CUDA kernels of distillation with PyTorch. Nothing here waits for the device: see cuda.cpp.
#include <tuple>
#include <type_traits>

#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "bindings/distillation_arguments.h"
#include "cuda/distillation.h"

namespace {

using namespace ltk::bindings;
using ltk::cuda::DistillationCall;
using ltk::cuda::Reduction;

template <class T>
DistillationCall<T> prepare(const DistillationArguments& a, const Tensor& tickets, const Tensor& error_word) {
  check_sizes<T>(a);
  DistillationCall<T> call{};
  call.classes = a.classes();
  call.rows = a.rows();
  call.input = a.input.const_data_ptr();
  call.input_layout = layout(a.input);
  call.teacher = a.teacher.const_data_ptr();
  call.teacher_type = element_type(a.teacher);
  call.teacher_layout = layout(a.teacher);
  call.same_type = a.teacher.scalar_type() == a.input.scalar_type();
  call.target_type = ltk::ElementType::i64;  // no probabilities, also where there is no target
  if (a.target) {
    call.target = a.target->const_data_ptr();
    call.target_type = element_type(*a.target);
    call.target_layout = row_layout(*a.target);
  }
  call.ignore_index = a.ignore_index;
  call.student_scale = T(a.student_scale);
  call.teacher_scale = T(a.teacher_scale);
  call.student_bias = data<T>(a.student_bias);
  call.teacher_bias = data<T>(a.teacher_bias);
  call.bias = data<T>(a.class_bias);
  call.row_weight = data<T>(a.sample_weight);
  call.kd_weight = T(a.kd_weight);
  call.ce_weight = T(a.ce_weight);
  call.reduction = static_cast<Reduction>(a.reduction);
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const DistillationArguments& a, const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  DistillationCall<T> call = prepare<T>(a, tickets, error_word);
  Tensor state = allocate({a.states()}, {1}, type_of<T>(), place.device);
  call.state = static_cast<T*>(state.mutable_data_ptr());
  Tensor loss = allocate_loss(&call, a.input, place.device);
  const char* error = nullptr;
  const int64_t partials = ltk::cuda::distillation_partials<E, T>(call, &error);
  check(error);
  // Given back while the kernel still runs: whoever gets this memory next uses it on the same stream, later.
  Tensor sums = allocate({partials}, {1}, ScalarType::Double, place.device);
  call.partials = static_cast<double*>(sums.mutable_data_ptr());
  check(ltk::cuda::distillation_forward<E, T>(call, place.stream()));
  return {loss, state};
}

template <class E, class T>
Tensor backward(const DistillationArguments& a, const Tensor& grad, const Tensor& state, bool need_input, bool inplace,
                const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  DistillationCall<T> call = prepare<T>(a, tickets, error_word);
  set_upstream(&call, a.input, grad, state, a.states());
  if (!need_input) return allocate({0}, {1}, type_of<T>(), place.device);
  Tensor d_input = inplace ? a.input : dense_like(a.input);
  call.gradient = d_input.mutable_data_ptr();
  call.gradient_layout = layout(d_input);
  check(ltk::cuda::distillation_backward<E, T>(call, place.stream()));
  return d_input;
}

std::tuple<Tensor, Tensor> distillation_forward(LTK_DISTILLATION_PARAMETERS, Tensor tickets, Tensor error_word) {
  const DistillationArguments a LTK_DISTILLATION_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, tickets, error_word);
  });
}

Tensor distillation_backward(Tensor grad, Tensor state, LTK_DISTILLATION_PARAMETERS, bool need_input, bool inplace,
                             Tensor tickets, Tensor error_word) {
  const DistillationArguments a LTK_DISTILLATION_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, grad, state, need_input, inplace,
                                                                              tickets, error_word);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("distillation_forward(" LTK_DISTILLATION_ARGUMENTS ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def("distillation_backward(Tensor grad, Tensor state, " LTK_DISTILLATION_ARGUMENTS
        ", bool need_input, bool inplace, Tensor tickets, Tensor error_word) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("distillation_forward", TORCH_BOX(&distillation_forward));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}
