// Registers the CUDA kernels of several experts' losses with PyTorch. Nothing here waits for the device: see cuda.cpp.
#include <tuple>
#include <type_traits>

#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "bindings/expert_arguments.h"
#include "cuda/expert_cross_entropy.h"

namespace {

using namespace ltk::bindings;
using ltk::cuda::ExpertCrossEntropyCall;
using ltk::cuda::Reduction;

template <class T>
ExpertCrossEntropyCall<T> prepare(const ExpertCrossEntropyArguments& a, const Tensor& tickets,
                                  const Tensor& error_word) {
  check_sizes<T>(a);
  ExpertCrossEntropyCall<T> call{};
  call.experts = a.experts();
  call.rows = a.rows();
  call.classes = a.classes();
  call.input = a.input.const_data_ptr();
  call.input_layout = expert_layout(a.input);
  call.target = a.target.const_data_ptr();
  call.target_type = element_type(a.target);
  call.target_layout = row_layout(a.target);
  call.ignore_index = a.ignore_index;
  call.uniform_scale = T(a.scale);
  call.scale = data<T>(a.class_scale);
  call.bias = data<T>(a.class_bias);
  call.margin = data<T>(a.class_margin);
  call.weight = data<T>(a.weight);
  call.row_weight = data<T>(a.sample_weight);
  call.diversity = T(a.diversity);
  call.temperature = data<T>(a.temperature);
  if (a.teacher) {
    call.teacher = a.teacher->const_data_ptr();
    call.teacher_type = element_type(*a.teacher);
    call.teacher_layout = layout(*a.teacher);
    call.same_type = a.teacher->scalar_type() == a.input.scalar_type();
    call.distillation = T(a.distillation);
    call.distillation_scale = T(a.distillation_scale);
  }
  call.reduction = static_cast<Reduction>(a.reduction);
  call.empty_zero = a.empty_zero;
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const ExpertCrossEntropyArguments& a, const Tensor& tickets,
                                   const Tensor& error_word) {
  const Place place(a.input);
  ExpertCrossEntropyCall<T> call = prepare<T>(a, tickets, error_word);
  constexpr ScalarType type = type_of<T>();
  Tensor state = allocate({a.states()}, {1}, type, place.device);
  T* memory = static_cast<T*>(state.mutable_data_ptr());
  call.mean = a.aggregate ? memory : nullptr;
  call.state = memory + a.means();
  const bool by_sample = call.reduction == Reduction::none;
  Tensor loss = by_sample ? allocate({call.rows}, {1}, type, place.device) : allocate({}, {}, type, place.device);
  call.loss = static_cast<T*>(loss.mutable_data_ptr());
  const char* error = nullptr;
  const int64_t partials = ltk::cuda::expert_cross_entropy_partials<E, T>(call, &error);
  check(error);
  // Given back while the kernel still runs: whoever gets this memory next uses it on the same stream, later.
  Tensor sums = allocate({partials + call.rows * (call.experts + 1)}, {1}, ScalarType::Double, place.device);
  call.partials = static_cast<double*>(sums.mutable_data_ptr());
  call.terms = call.partials + partials;
  check(ltk::cuda::expert_cross_entropy_forward<E, T>(call, place.stream()));
  return {loss, state};
}

template <class E, class T>
Tensor backward(const ExpertCrossEntropyArguments& a, const Tensor& grad, const Tensor& state, bool need_input,
                bool inplace, const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  ExpertCrossEntropyCall<T> call = prepare<T>(a, tickets, error_word);
  const bool by_sample = call.reduction == Reduction::none;
  if (state.numel() != a.states() || state.scalar_type() != type_of<T>() || !state.is_contiguous() ||
      grad.scalar_type() != type_of<T>() || grad.dim() != int64_t(by_sample) ||
      (by_sample && grad.size(0) != call.rows))
    fail("grad or state are not those of these logits");
  if (!need_input) return allocate({0}, {1}, type_of<T>(), place.device);
  call.state = static_cast<T*>(const_cast<void*>(state.const_data_ptr())) + a.means();
  call.upstream = static_cast<const T*>(grad.const_data_ptr());
  call.upstream_layout = row_layout(grad);
  Tensor d_input = inplace ? a.input : torch::stable::empty_like(a.input);
  call.gradient = d_input.mutable_data_ptr();
  call.gradient_layout = expert_layout(d_input);
  check(ltk::cuda::expert_cross_entropy_backward<E, T>(call, place.stream()));
  return d_input;
}

std::tuple<Tensor, Tensor> expert_cross_entropy_forward(LTK_EXPERT_CROSS_ENTROPY_PARAMETERS, Tensor tickets,
                                                        Tensor error_word) {
  const ExpertCrossEntropyArguments a LTK_EXPERT_CROSS_ENTROPY_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, tickets, error_word);
  });
}

Tensor expert_cross_entropy_backward(Tensor grad, Tensor state, LTK_EXPERT_CROSS_ENTROPY_PARAMETERS, bool need_input,
                                     bool inplace, Tensor tickets, Tensor error_word) {
  const ExpertCrossEntropyArguments a LTK_EXPERT_CROSS_ENTROPY_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, grad, state, need_input, inplace,
                                                                              tickets, error_word);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("expert_cross_entropy_forward(" LTK_EXPERT_CROSS_ENTROPY_ARGUMENTS
        ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def("expert_cross_entropy_backward(Tensor grad, Tensor state, " LTK_EXPERT_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool inplace, Tensor tickets, Tensor error_word) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("expert_cross_entropy_forward", TORCH_BOX(&expert_cross_entropy_forward));
  m.impl("expert_cross_entropy_backward", TORCH_BOX(&expert_cross_entropy_backward));
}
