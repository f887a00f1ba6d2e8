// Registers the CUDA kernels with PyTorch through the LibTorch stable ABI. Nothing here waits for the device: values
// are not looked at, and what the kernels find wrong with a label they write into a word of pinned memory.
//
// With LTK_EMULATE the same kernels run on the CPU and are registered for CPU tensors, for tests.
#include <cmath>
#include <tuple>

#include "bindings/cross_entropy_arguments.h"
#include "bindings/cuda_call.h"
#include "bindings/cuda_types.h"
#include "cuda/cross_entropy.h"

namespace {

using namespace ltk::bindings;
using ltk::cuda::Call;
using ltk::cuda::Reduction;

template <class T>
Call<T> prepare(const Arguments& a, const Tensor& tickets, const Tensor& error_word) {
  check_sizes<T>(a);
  Call<T> call{};
  call.classes = a.input.size(1);
  call.rows = a.input.numel() / call.classes;
  call.input = a.input.const_data_ptr();
  call.input_layout = layout(a.input);
  call.target = a.target.const_data_ptr();
  call.target_type = element_type(a.target);
  call.target_layout = ltk::is_floating(call.target_type) ? layout(a.target) : row_layout(a.target);
  call.ignore_index = a.ignore_index;
  call.uniform_scale = T(a.scale);
  call.scale = data<T>(a.class_scale);
  call.bias = data<T>(a.class_bias);
  call.weight = data<T>(a.weight);
  call.row_weight = data<T>(a.sample_weight);
  if (a.class_margin && device_of(*a.class_margin).type == aoti_torch_device_type_cpu() && a.class_margin->numel() == 1)
    call.one_margin = *data<T>(a.class_margin);
  else
    call.margin = data<T>(a.class_margin);
  call.options = {T(a.label_smoothing), T(a.label_smoothing / double(call.classes)),
                  T(call.classes),      T(a.focal_gamma),
                  T(a.z_loss),          a.focal_weighted,
                  a.focal_detached};
  set_counters(&call, a.input, tickets, error_word);
  return call;
}

template <class E, class T>
std::tuple<Tensor, Tensor> forward(const Arguments& a, int64_t reduction, bool empty_zero, const Tensor& tickets,
                                   const Tensor& error_word) {
  const Place place(a.input);
  Call<T> call = prepare<T>(a, tickets, error_word);
  call.reduction = static_cast<Reduction>(reduction);
  call.empty_zero = empty_zero;
  const int64_t rows = call.rows;
  constexpr ScalarType type = type_of<T>();
  Tensor state = allocate({4 * rows + 1}, {1}, type, place.device);
  call.state = static_cast<T*>(state.mutable_data_ptr());
  Tensor loss = allocate_loss(&call, a.input, place.device);
  const char* error = nullptr;
  const int64_t partials = ltk::cuda::forward_partials<E, T>(call, &error);
  check(error);
  // Given back while the kernel still runs: whoever gets this memory next uses it on the same stream, later.
  Tensor sums = allocate({2 * partials}, {1}, ScalarType::Double, place.device);
  call.partials = static_cast<double*>(sums.mutable_data_ptr());
  check(ltk::cuda::forward<E, T>(call, place.stream()));
  return {loss, state};
}

template <class E, class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Arguments& a, const Tensor& grad, const Tensor& state,
                                            bool need_input, bool need_scale, bool need_bias, bool inplace,
                                            const Tensor& tickets, const Tensor& error_word) {
  const Place place(a.input);
  Call<T> call = prepare<T>(a, tickets, error_word);
  constexpr ScalarType type = type_of<T>();
  set_upstream(&call, a.input, grad, state, 4 * call.rows + 1);
  const auto vector = [&](bool needed) { return allocate({needed ? call.classes : 0}, {1}, type, place.device); };
  Tensor d_input = !need_input ? vector(false) : inplace ? a.input : dense_like(a.input);
  if (need_input) {
    call.gradient = d_input.mutable_data_ptr();
    call.gradient_layout = layout(d_input);
  }
  Tensor d_scale = vector(need_scale), d_bias = vector(need_bias), sums;
  if (need_scale || need_bias) {
    if (tickets.numel() < ltk::cuda::column_chunks(call.classes)) fail("expected a ticket for every chunk of columns");
    const char* error = nullptr;
    const int64_t splits = ltk::cuda::column_splits<E, T>(call, &error);
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
  if (need_input || need_scale || need_bias) check(ltk::cuda::backward<E, T>(call, place.stream()));
  return {d_input, d_scale, d_bias};
}

std::tuple<Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, OptionalTensor weight,
                                                 OptionalTensor class_scale, OptionalTensor class_bias,
                                                 OptionalTensor class_margin, OptionalTensor sample_weight,
                                                 int64_t ignore_index, int64_t reduction, double label_smoothing,
                                                 double scale, double focal_gamma, bool focal_weighted,
                                                 bool focal_detached, double z_loss, bool empty_zero, Tensor tickets,
                                                 Tensor error_word) {
  const Arguments a{input,        target,          weight, class_scale, class_bias,     class_margin,   sample_weight,
                    ignore_index, label_smoothing, scale,  focal_gamma, focal_weighted, focal_detached, z_loss};
  return with_types(input, [&](auto* logit, auto number) {
    return forward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, reduction, empty_zero, tickets,
                                                                             error_word);
  });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_backward(
    Tensor grad, Tensor state, Tensor input, Tensor target, OptionalTensor weight, OptionalTensor class_scale,
    OptionalTensor class_bias, OptionalTensor class_margin, OptionalTensor sample_weight, int64_t ignore_index, int64_t,
    double label_smoothing, double scale, double focal_gamma, bool focal_weighted, bool focal_detached, double z_loss,
    bool, bool need_input, bool need_scale, bool need_bias, bool inplace, Tensor tickets, Tensor error_word) {
  const Arguments a{input,        target,          weight, class_scale, class_bias,     class_margin,   sample_weight,
                    ignore_index, label_smoothing, scale,  focal_gamma, focal_weighted, focal_detached, z_loss};
  return with_types(input, [&](auto* logit, auto number) {
    return backward<std::remove_pointer_t<decltype(logit)>, decltype(number)>(a, grad, state, need_input, need_scale,
                                                                              need_bias, inplace, tickets, error_word);
  });
}

// Whether the library's code runs on the current device: raises what CUDA says is wrong.
int64_t probe() {
  check(ltk::cuda::probe());
  return 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cuda, m) {
  m.def("cross_entropy_forward(" LTK_CROSS_ENTROPY_ARGUMENTS
        ", Tensor tickets, Tensor error_word) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor grad, Tensor state, " LTK_CROSS_ENTROPY_ARGUMENTS
      ", bool need_input, bool need_class_scale, bool need_class_bias, bool inplace, Tensor tickets, Tensor error_word)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("probe() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, CompositeExplicitAutograd, m) { m.impl("probe", TORCH_BOX(&probe)); }

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cuda, LTK_CUDA_KEY, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}
