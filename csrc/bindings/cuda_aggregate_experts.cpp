// Registers the CUDA kernels of the experts' mean with PyTorch. Nothing here
// waits for the device: see cuda.cpp.
#include <tuple>
#include <type_traits>

#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "bindings/expert_arguments.h"
#include "cuda/aggregate_experts.h"

namespace {

using namespace ltk::bindings;
using ltk::AggregateMode;
using ltk::ExpertWeights;
using ltk::cuda::AggregateCall;

template <class T>
AggregateCall<T> prepare(const AggregateExpertsArguments& a, const Tensor& state, const Tensor& tickets,
                         const Tensor& error_word) {
  AggregateCall<T> call{};
  call.experts = a.experts();
  call.rows = a.rows();
  call.classes = a.classes();
  call.topk = a.topk;
  call.mode = static_cast<AggregateMode>(a.mode);
  call.weights = static_cast<ExpertWeights>(a.weights);
  call.input = a.input.const_data_ptr();
  call.input_layout = expert_layout(a.input);
  call.target_type = ltk::ElementType::i64;  // no probabilities: there is no target
  call.expert_weight = data<T>(a.expert_weight);
  call.state = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
  T* best = call.state + a.softmaxes();
  call.best = best;
  call.confidence = best + a.topk * a.rows();
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const AggregateExpertsArguments& a, const Tensor& tickets,
                                   const Tensor& error_word) {
  const Place place(a.input);
  check_sizes<T>(a);
  Tensor state = allocate({a.states()}, {1}, type_of<T>(), place.device);
  AggregateCall<T> call = prepare<T>(a, state, tickets, error_word);
  Tensor output = allocate({call.rows, call.classes}, {call.classes, 1}, a.input.scalar_type(), place.device);
  call.output = output.mutable_data_ptr();
  check(ltk::cuda::aggregate_experts_forward<E, T>(call, place.stream()));
  return {output, state};
}

template <class E, class T>
std::tuple<Tensor, Tensor> backward(const AggregateExpertsArguments& a, const Tensor& grad, const Tensor& state,
                                    bool need_input, bool need_weight, bool inplace, const Tensor& tickets,
                                    const Tensor& error_word) {
  const Place place(a.input);
  check_sizes<T>(a);
  constexpr ScalarType type = type_of<T>();
  if (state.numel() != a.states() || state.scalar_type() != type || !state.is_contiguous() || grad.dim() != 2 ||
      grad.size(0) != a.rows() || grad.size(1) != a.classes() || grad.scalar_type() != a.input.scalar_type())
    fail("grad or state are not those of these logits");
  AggregateCall<T> call = prepare<T>(a, state, tickets, error_word);
  call.grad = grad.const_data_ptr();
  call.grad_layout = layout(grad);
  const Tensor none = allocate({0}, {1}, type, place.device);
  Tensor d_input = !need_input ? none : inplace ? a.input : torch::stable::empty_like(a.input);
  if (need_input) {
    call.gradient = d_input.mutable_data_ptr();
    call.gradient_layout = expert_layout(d_input);
  }
  Tensor d_weight = none, terms, sums;
  if (need_weight && a.expert_weight) {
    d_weight = torch::stable::empty_like(*a.expert_weight);
    call.weight_sums = static_cast<T*>(d_weight.mutable_data_ptr());
    if (call.weights == ExpertWeights::expert) {
      const char* error = nullptr;
      const int64_t partials = ltk::cuda::aggregate_experts_partials<E, T>(call, &error);
      check(error);
      terms = allocate({call.rows * call.experts}, {1}, type, place.device);
      sums = allocate({partials}, {1}, ScalarType::Double, place.device);
      call.terms = static_cast<T*>(terms.mutable_data_ptr());
      call.partials = static_cast<double*>(sums.mutable_data_ptr());
    }
  }
  check(ltk::cuda::aggregate_experts_backward<E, T>(call, place.stream()));
  return {d_input, d_weight};
}

std::tuple<Tensor, Tensor> aggregate_experts_forward(Tensor input, OptionalTensor expert_weight, int64_t mode,
                                                     int64_t weights, int64_t topk, Tensor tickets, Tensor error_word) {
  const AggregateExpertsArguments a{input, expert_weight, mode, weights, topk};
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, tickets, error_word);
  });
}

std::tuple<Tensor, Tensor> aggregate_experts_backward(Tensor grad, Tensor state, Tensor input,
                                                      OptionalTensor expert_weight, int64_t mode, int64_t weights,
                                                      int64_t topk, bool need_input, bool need_expert_weight,
                                                      bool inplace, Tensor tickets, Tensor error_word) {
  const AggregateExpertsArguments a{input, expert_weight, mode, weights, topk};
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(
        a, grad, state, need_input, need_expert_weight, inplace, tickets, error_word);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("aggregate_experts_forward(" LTK_AGGREGATE_EXPERTS_ARGUMENTS
        ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def(
      "aggregate_experts_backward(Tensor grad, Tensor "
      "state, " LTK_AGGREGATE_EXPERTS_ARGUMENTS
      ", bool need_input, bool need_expert_weight, bool inplace, Tensor "
      "tickets, Tensor error_word)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("aggregate_experts_forward", TORCH_BOX(&aggregate_experts_forward));
  m.impl("aggregate_experts_backward", TORCH_BOX(&aggregate_experts_backward));
}
