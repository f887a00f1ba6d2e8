// Registers the CUDA kernels of the losses whose adjustments depend on the row. Nothing here waits for the device: see
// cuda.cpp.
#include <cmath>
#include <tuple>
#include <type_traits>

#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "bindings/row_cross_entropy_arguments.h"
#include "cuda/row_cross_entropy.h"

namespace {

using namespace ltk::bindings;
using ltk::cuda::Reduction;
using ltk::cuda::RowCall;

bool is_number_of_host(const Tensor& tensor) {
  return tensor.numel() == 1 && device_of(tensor).type == aoti_torch_device_type_cpu();
}

template <class T>
RowCall<T> prepare(const RowArguments& a, const Tensor& tickets, const Tensor& error_word) {
  check_sizes<T>(a);
  RowCall<T> call{};
  call.classes = a.input.size(1);
  call.rows = a.input.numel() / call.classes;
  call.input = a.input.const_data_ptr();
  call.input_layout = layout(a.input);
  call.target = a.target.const_data_ptr();
  call.target_type = element_type(a.target);
  call.target_layout = row_layout(a.target);
  if (a.second_target) {
    call.second_target = a.second_target->const_data_ptr();
    call.second_layout = row_layout(*a.second_target);
    if (is_number_of_host(*a.lam))
      call.one_lam = *data<T>(a.lam);
    else
      call.lam = data<T>(a.lam);
  }
  call.ignore_index = a.ignore_index;
  call.uniform_scale = T(a.scale);
  call.scale = data<T>(a.class_scale);
  call.bias = data<T>(a.class_bias);
  call.weight = data<T>(a.weight);
  call.row_weight = data<T>(a.sample_weight);
  if (a.class_margin && is_number_of_host(*a.class_margin))
    call.one_margin = *data<T>(a.class_margin);
  else
    call.margin = data<T>(a.class_margin);
  call.margin_type = ltk::MarginType(a.margin_type);
  if (call.margin_type != ltk::MarginType::additive && (!a.class_margin || a.row_gate))
    fail("expected a class_margin and no row_gate with a margin on the angle");
  call.class_smoothing = data<T>(a.class_smoothing);
  call.smoothing = T(a.label_smoothing);
  call.off_target = a.off_target;
  const bool smoothed = a.class_smoothing || a.label_smoothing > 0;
  call.options = {T(smoothed),     T(smoothed / double(call.classes)),
                  T(call.classes), T(a.focal_gamma),
                  T(a.z_loss),     a.focal_weighted,
                  a.focal_detached};
  call.gate = data<T>(a.row_gate);
  call.feature_norm = data<T>(a.feature_norm);
  call.influence_alpha = T(a.influence_alpha);
  call.influence_eps = T(a.influence_eps);
  call.pair_term = ltk::PairTerm(a.pair_term);
  call.pair = data<T>(a.pair);
  call.pair_p = T(a.pair_p);
  call.pair_q = T(a.pair_q);
  if (call.pair_term == ltk::PairTerm::seesaw) call.log_pair_eps = T(std::log(a.pair_eps));
  if (call.pair_term == ltk::PairTerm::drop) {
    call.drop_threshold = uint64_t(a.pair_p * 4294967296.0);
    call.seed = uint64_t(a.seed);
    call.step = static_cast<const int64_t*>(a.pair_step->const_data_ptr());
  }
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const RowArguments& a, int64_t reduction, bool empty_zero, const Tensor& tickets,
                                   const Tensor& error_word) {
  const Place place(a.input);
  RowCall<T> call = prepare<T>(a, tickets, error_word);
  call.reduction = static_cast<Reduction>(reduction);
  call.empty_zero = empty_zero;
  const int64_t rows = call.rows;
  constexpr ScalarType type = type_of<T>();
  Tensor state = allocate({a.states(rows)}, {1}, type, place.device);
  call.state = static_cast<T*>(state.mutable_data_ptr());
  Tensor loss = allocate_loss(&call, a.input, place.device);
  const char* error = nullptr;
  const int64_t partials = ltk::cuda::row_forward_partials<E, T>(call, &error);
  check(error);
  // Given back while the kernel still runs: whoever gets this memory next uses it on the same stream, later.
  Tensor sums = allocate({partials}, {1}, ScalarType::Double, place.device);
  call.partials = static_cast<double*>(sums.mutable_data_ptr());
  check(ltk::cuda::row_forward<E, T>(call, place.stream()));
  return {loss, state};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class E, class T>
Gradients backward(const RowArguments& a, const Tensor& grad, const Tensor& state, bool need_input, bool need_scale,
                   bool need_bias, bool need_gate, bool inplace, const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  RowCall<T> call = prepare<T>(a, tickets, error_word);
  constexpr ScalarType type = type_of<T>();
  set_upstream(&call, a.input, grad, state, a.states(call.rows));
  if ((need_scale && !a.class_scale) || (need_bias && !a.class_bias) || (need_gate && !a.row_gate))
    fail("expected the parameters that a gradient is asked for");
  const auto vector = [&](bool needed) { return allocate({needed ? call.classes : 0}, {1}, type, place.device); };
  Tensor d_input = !need_input ? vector(false) : inplace ? a.input : dense_like(a.input);
  if (need_input) {
    call.gradient = d_input.mutable_data_ptr();
    call.gradient_layout = layout(d_input);
  }
  Tensor d_gate = need_gate ? dense_like(*a.row_gate) : vector(false);
  if (need_gate) call.gate_gradient = static_cast<T*>(d_gate.mutable_data_ptr());
  Tensor d_scale = vector(need_scale), d_bias = vector(need_bias), sums;
  if (need_scale || need_bias) {
    if (tickets.numel() < ltk::cuda::column_chunks(call.classes)) fail("expected a ticket for every chunk of columns");
    const char* error = nullptr;
    const int64_t splits = ltk::cuda::row_column_splits<E, T>(call, &error);
    check(error);
    const int64_t of_one = splits * call.classes;
    sums = allocate({of_one * (need_scale + need_bias)}, {1}, type, place.device);
    T* memory = static_cast<T*>(sums.mutable_data_ptr());
    if (need_scale) {
      call.scale_sums = static_cast<T*>(d_scale.mutable_data_ptr());
      call.scale_partials = memory;
    }
    if (need_bias) {
      call.bias_sums = static_cast<T*>(d_bias.mutable_data_ptr());
      call.bias_partials = memory + (need_scale ? of_one : 0);
    }
  }
  if (need_input || need_scale || need_bias || need_gate) check(ltk::cuda::row_backward<E, T>(call, place.stream()));
  return {d_input, d_scale, d_bias, d_gate};
}

std::tuple<Tensor, Tensor> row_cross_entropy_forward(LTK_ROW_CROSS_ENTROPY_PARAMETERS, Tensor tickets,
                                                     Tensor error_word) {
  const RowArguments a LTK_ROW_CROSS_ENTROPY_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, reduction, empty_zero, tickets,
                                                                             error_word);
  });
}

Gradients row_cross_entropy_backward(Tensor grad, Tensor state, LTK_ROW_CROSS_ENTROPY_PARAMETERS, bool need_input,
                                     bool need_scale, bool need_bias, bool need_gate, bool inplace, Tensor tickets,
                                     Tensor error_word) {
  const RowArguments a LTK_ROW_CROSS_ENTROPY_PASSED;
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(
        a, grad, state, need_input, need_scale, need_bias, need_gate, inplace, tickets, error_word);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("row_cross_entropy_forward(" LTK_ROW_CROSS_ENTROPY_ARGUMENTS
        ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def("row_cross_entropy_backward(Tensor grad, Tensor state, " LTK_ROW_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool need_class_scale, bool need_class_bias, bool need_row_gate, bool inplace, "
        "Tensor tickets, Tensor error_word) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("row_cross_entropy_forward", TORCH_BOX(&row_cross_entropy_forward));
  m.impl("row_cross_entropy_backward", TORCH_BOX(&row_cross_entropy_backward));
}
