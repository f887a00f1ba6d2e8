// Registers the CPU core with PyTorch through the LibTorch stable ABI. The kernels know nothing of tensors; here
// tensors become pointers and layouts, parameters are prepared once a call (O(N + C)), bad values are refused, and rows
// are spread over threads. What is refused is only named here: ltkernels/ops/cross_entropy.py then looks for the value
// and raises in the words that all backends share.
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "bindings/cpu_prepared.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Arguments& a, int64_t reduction, bool empty_zero, bool with_gradient) {
  Prepared<T> prepared(a);
  auto& call = prepared.call;
  const int64_t rows = call.rows;
  constexpr ScalarType type = type_of<T>();
  const double denominator = prepared.check_labels(data<T>(a.class_bias), reduction == mean_weight);
  double inverse = 1;
  if (reduction == mean_weight || reduction == mean_count)
    inverse = denominator == 0 && empty_zero ? 0.0 : 1.0 / denominator;
  call.inverse_denominator = T(inverse);

  Tensor state = allocate({4 * rows + 1}, {1}, type);
  call.state = static_cast<T*>(state.mutable_data_ptr());
  call.state[4 * rows] = call.inverse_denominator;
  Tensor gradient = with_gradient ? dense_like(a.input) : Tensor();
  if (with_gradient) {
    call.gradient = gradient.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(gradient);
  }
  Tensor loss = reduction != none    ? allocate({}, {}, type)
                : a.input.dim() == 2 ? allocate({rows}, {1}, type)
                                     : allocate({a.input.size(0), a.input.size(2)}, {a.input.size(2), 1}, type);
  std::vector<T> row_losses(reduction == none ? 0 : rows);
  call.loss = reduction == none ? static_cast<T*>(loss.mutable_data_ptr()) : row_losses.data();

  std::atomic<bool> bad{false};
  const auto kernel = ltk::kernels().cross_entropy<T>().forward;
  torch::stable::parallel_for(0, rows, prepared.grain(), [&](int64_t begin, int64_t end) {
    if (!kernel(call, begin, end)) bad = true;
  });
  if (bad) fail("value: bad probability in target");
  if (reduction != none) {
    double total = 0;
    for (const T row_loss : row_losses) total += row_loss;
    // 0 / 0 is torch's mean over nothing; with empty_zero the numerator is 0 too.
    *static_cast<T*>(loss.mutable_data_ptr()) = T(inverse == 0 ? 0.0 : total * inverse);
  }
  return {loss, state, gradient};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Arguments& a, const Tensor& grad, const Tensor& state,
                                            bool need_input, bool need_scale, bool need_bias, bool inplace) {
  Prepared<T> prepared(a);
  auto& call = prepared.call;
  const int64_t rows = call.rows, classes = call.classes;
  constexpr ScalarType type = type_of<T>();
  const std::vector<T> upstream = upstream_of<T>(a.input, grad);
  if (state.numel() != 4 * rows + 1 || state.scalar_type() != type || !state.is_contiguous())
    fail("grad or state are not those of these logits");
  prepared.check_labels(data<T>(a.class_bias), false);
  call.state = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
  call.inverse_denominator = call.state[4 * rows];
  call.upstream = upstream.data();
  call.upstream_stride = grad.dim() == 0 ? 0 : 1;
  Tensor d_input = !need_input ? allocate({0}, {1}, type) : inplace ? a.input : dense_like(a.input);
  if (need_input) {
    call.gradient = d_input.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(d_input);
  }
  auto [d_scale, d_bias] = backward_rows<T>(call, classes, need_scale, need_bias, prepared.grain(),
                                            ltk::kernels().cross_entropy<T>().backward);
  return {d_input, d_scale, d_bias};
}

// The row losses, and over the logits their gradient times `grad`: for logits that live for this call alone. One visit
// of a row, where a forward and a backward over the logits would take its exponentials twice.
template <class T>
Tensor gradient(const Arguments& a, const Tensor& grad) {
  Prepared<T> prepared(a);
  auto& call = prepared.call;
  constexpr ScalarType type = type_of<T>();
  const std::vector<T> upstream = upstream_of<T>(a.input, grad);
  prepared.check_labels(data<T>(a.class_bias), false);
  call.upstream = upstream.data();
  call.upstream_stride = grad.dim() == 0 ? 0 : 1;
  std::vector<T> state(4 * call.rows);
  call.state = state.data();
  call.gradient = const_cast<void*>(call.input);
  call.gradient_type = call.input_type;
  call.gradient_layout = call.input_layout;
  Tensor loss = a.input.dim() == 2 ? allocate({call.rows}, {1}, type)
                                   : allocate({a.input.size(0), a.input.size(2)}, {a.input.size(2), 1}, type);
  call.loss = static_cast<T*>(loss.mutable_data_ptr());
  std::atomic<bool> bad{false};
  const auto kernel = ltk::kernels().cross_entropy<T>().forward;
  torch::stable::parallel_for(0, call.rows, prepared.grain(), [&](int64_t begin, int64_t end) {
    if (!kernel(call, begin, end)) bad = true;
  });
  if (bad) fail("value: bad probability in target");
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, OptionalTensor weight,
                                                         OptionalTensor class_scale, OptionalTensor class_bias,
                                                         OptionalTensor class_margin, OptionalTensor sample_weight,
                                                         int64_t ignore_index, int64_t reduction,
                                                         double label_smoothing, double scale, double focal_gamma,
                                                         bool focal_weighted, bool focal_detached, double z_loss,
                                                         bool empty_zero, bool with_gradient) {
  if (!ltk::is_floating(element_type(target)) && !target.is_contiguous()) target = torch::stable::contiguous(target);
  const Arguments a{input,        target,          weight, class_scale, class_bias,     class_margin,   sample_weight,
                    ignore_index, label_smoothing, scale,  focal_gamma, focal_weighted, focal_detached, z_loss};
  return input.scalar_type() == ScalarType::Double ? forward<double>(a, reduction, empty_zero, with_gradient)
                                                   : forward<float>(a, reduction, empty_zero, with_gradient);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_backward(
    Tensor grad, Tensor state, Tensor input, Tensor target, OptionalTensor weight, OptionalTensor class_scale,
    OptionalTensor class_bias, OptionalTensor class_margin, OptionalTensor sample_weight, int64_t ignore_index, int64_t,
    double label_smoothing, double scale, double focal_gamma, bool focal_weighted, bool focal_detached, double z_loss,
    bool, bool need_input, bool need_scale, bool need_bias, bool inplace) {
  if (!ltk::is_floating(element_type(target)) && !target.is_contiguous()) target = torch::stable::contiguous(target);
  const Arguments a{input,        target,          weight, class_scale, class_bias,     class_margin,   sample_weight,
                    ignore_index, label_smoothing, scale,  focal_gamma, focal_weighted, focal_detached, z_loss};
  return input.scalar_type() == ScalarType::Double
             ? backward<double>(a, grad, state, need_input, need_scale, need_bias, inplace)
             : backward<float>(a, grad, state, need_input, need_scale, need_bias, inplace);
}

Tensor cross_entropy_gradient(Tensor grad, Tensor input, Tensor target, OptionalTensor weight,
                              OptionalTensor class_scale, OptionalTensor class_bias, OptionalTensor class_margin,
                              OptionalTensor sample_weight, int64_t ignore_index, int64_t, double label_smoothing,
                              double scale, double focal_gamma, bool focal_weighted, bool focal_detached, double z_loss,
                              bool) {
  if (!ltk::is_floating(element_type(target)) && !target.is_contiguous()) target = torch::stable::contiguous(target);
  const Arguments a{input,        target,          weight, class_scale, class_bias,     class_margin,   sample_weight,
                    ignore_index, label_smoothing, scale,  focal_gamma, focal_weighted, focal_detached, z_loss};
  return input.scalar_type() == ScalarType::Double ? gradient<double>(a, grad) : gradient<float>(a, grad);
}

int64_t select_isa(int64_t wanted) { return ltk::select_instruction_set(int(wanted)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("cross_entropy_forward(" LTK_CROSS_ENTROPY_ARGUMENTS ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor grad, Tensor state, " LTK_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool need_class_scale, bool need_class_bias, bool inplace) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_gradient(Tensor grad, " LTK_CROSS_ENTROPY_ARGUMENTS ") -> Tensor");
  m.def("select_isa(int wanted) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CompositeExplicitAutograd, m) { m.impl("select_isa", TORCH_BOX(&select_isa)); }
