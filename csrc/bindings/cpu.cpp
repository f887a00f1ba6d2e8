// Registers the CPU core with PyTorch through the LibTorch stable ABI. The kernels know nothing of tensors; here
// tensors become pointers and layouts, parameters are prepared once a call (O(N + C)), bad values are refused, and rows
// are spread over threads. What is refused is only named here: ltkernels/ops/cross_entropy.py then looks for the value
// and raises in the words that all backends share.
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "bindings/cross_entropy_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

enum Reduction : int64_t { none, sum, mean_weight, mean_count };  // ltkernels/ops/options.py

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  return ltk::bindings::allocate(sizes, strides, type, {aoti_torch_device_type_cpu(), 0});
}

template <class T>
void check_finite(const char* name, const T* values, int64_t count, T low) {
  bool good = true;
  for (int64_t j = 0; j < count; ++j) good &= values[j] >= low && values[j] <= std::numeric_limits<T>::max();
  if (!good) fail(std::string("value: bad value in ") + name);
}

// The call and the memory its prepared parameters live in.
template <class T>
struct Prepared {
  ltk::CrossEntropyCall<T> call;
  std::vector<T> scale, bias, smooth;

  explicit Prepared(const Arguments& a) {
    check_sizes<T>(a);
    constexpr T lowest = std::numeric_limits<T>::lowest();
    const int64_t classes = call.classes = a.input.size(1);
    call.rows = a.input.numel() / classes;
    call.input = a.input.const_data_ptr();
    call.input_type = element_type(a.input);
    call.input_layout = layout(a.input);
    call.target = a.target.const_data_ptr();
    call.target_type = element_type(a.target);
    if (ltk::is_floating(call.target_type)) call.target_layout = layout(a.target);
    call.ignore_index = a.ignore_index;
    const T s = call.uniform_scale = T(a.scale);
    const T* class_bias = data<T>(a.class_bias);
    call.weight = data<T>(a.weight);
    if (call.weight != nullptr) check_finite<T>("weight", call.weight, classes, T(0));
    if (class_bias != nullptr) {
      bool good = true;
      for (int64_t j = 0; j < classes; ++j) good &= class_bias[j] <= std::numeric_limits<T>::max();  // -inf is allowed
      if (!good) fail("value: bad value in class_bias");
    }
    const T* class_scale = data<T>(a.class_scale);
    if (class_scale != nullptr) {
      check_finite<T>("class_scale", class_scale, classes, lowest);
      scale.resize(classes);
      for (int64_t j = 0; j < classes; ++j) scale[j] = s * class_scale[j];
      call.scale = scale.data();
    }
    if (class_bias != nullptr && s == T(1)) {
      call.bias = class_bias;
    } else if (class_bias != nullptr || class_scale != nullptr) {
      bias.resize(classes);
      for (int64_t j = 0; class_bias != nullptr && j < classes; ++j) bias[j] = s * class_bias[j];
      call.bias = bias.data();
    }
    if (a.class_margin) {
      call.margin = data<T>(a.class_margin);
      call.margin_stride = a.class_margin->numel() == 1 ? 0 : 1;
      check_finite<T>("class_margin", call.margin, a.class_margin->numel(), lowest);
    }
    call.row_weight = data<T>(a.sample_weight);
    if (call.row_weight != nullptr) check_finite<T>("sample_weight", call.row_weight, call.rows, T(0));
    auto& o = call.options;
    o = {T(a.label_smoothing), 0, 0, T(a.focal_gamma), T(a.z_loss), a.focal_weighted, a.focal_detached};
    if (a.label_smoothing > 0) {
      smooth.resize(classes);
      double total = 0;
      int64_t reached = 0;
      for (int64_t j = 0; j < classes; ++j) {
        const bool present = class_bias == nullptr || std::isfinite(class_bias[j]);
        smooth[j] = !present ? T(0) : call.weight != nullptr ? call.weight[j] : T(1);
        reached += present;
        total += smooth[j];
      }
      o.smoothing_per_class = T(a.label_smoothing / double(reached));
      o.smoothing_total = T(total);
      call.smooth = smooth.data();
    }
  }

  // Refuses labels that are out of range; returns the denominator of the two means.
  double check_labels(const T* class_bias, bool by_weight) const {
    if (ltk::is_floating(call.target_type)) {
      double total = double(call.rows);
      if (by_weight && call.row_weight != nullptr) {
        total = 0;
        for (int64_t row = 0; row < call.rows; ++row) total += call.row_weight[row];
      }
      return total;
    }
    double total = 0;
    for (int64_t row = 0; row < call.rows; ++row) {
      const int64_t y = ltk::label_at(call.target, call.target_type, row);
      const bool beyond = call.target_type == ltk::ElementType::u64 && y < 0;  // 2^63 or more
      if (y == call.ignore_index && !beyond) continue;
      if (y < 0 || y >= call.classes) fail("value: label out of range in target");
      if (class_bias != nullptr && class_bias[y] == -std::numeric_limits<T>::infinity())
        fail("value: label of a class without a bias in target");
      total += by_weight
                   ? double(call.weight ? call.weight[y] : T(1)) * double(call.row_weight ? call.row_weight[row] : T(1))
                   : 1.0;
    }
    return total;
  }

  // Rows a thread takes at least: 32k logits, below which a second thread costs more than it does.
  int64_t grain() const { return std::max<int64_t>(1, 32768 / call.classes); }
};

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
  const auto vector = [&](bool needed) { return allocate({needed ? classes : 0}, {1}, type); };
  const bool of_rows = grad.dim() == a.input.dim() - 1 && grad.size(0) == a.input.size(0) &&
                       (grad.dim() == 1 || grad.size(1) == a.input.size(2));
  if (state.numel() != 4 * rows + 1 || state.scalar_type() != type || !state.is_contiguous() ||
      grad.scalar_type() != type || !(grad.dim() == 0 || of_rows))
    fail("grad or state are not those of these logits");
  prepared.check_labels(data<T>(a.class_bias), false);
  call.state = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
  call.inverse_denominator = call.state[4 * rows];
  // Any upstream: a scalar, or one value a row with any strides (expanded, sliced).
  std::vector<T> upstream(1);
  if (grad.dim() == 0) {
    upstream[0] = *static_cast<const T*>(grad.const_data_ptr());
  } else {
    upstream.resize(rows);
    const int64_t inner = grad.dim() == 2 ? grad.size(1) : 1;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row)
      upstream[row] = from[row / inner * grad.stride(0) + (grad.dim() == 2 ? row % inner * grad.stride(1) : 0)];
    call.upstream_stride = 1;
  }
  call.upstream = upstream.data();
  Tensor d_input = !need_input ? vector(false) : inplace ? a.input : dense_like(a.input);
  if (need_input) {
    call.gradient = d_input.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(d_input);
  }
  Tensor d_scale = vector(need_scale), d_bias = vector(need_bias);
  const auto kernel = ltk::kernels().cross_entropy<T>().backward;
  if (!need_scale && !need_bias) {
    torch::stable::parallel_for(0, rows, prepared.grain(),
                                [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
    return {d_input, d_scale, d_bias};
  }
  // Sums over rows: blocks of rows that do not depend on the number of threads, added in their order.
  const int64_t blocks = std::clamp<int64_t>(rows / 16, 1, 16);
  std::vector<T> scale_sums(need_scale ? blocks * classes : 0), bias_sums(need_bias ? blocks * classes : 0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      ltk::CrossEntropyCall<T> part = call;
      if (need_scale) part.scale_sums = scale_sums.data() + block * classes;
      if (need_bias) part.bias_sums = bias_sums.data() + block * classes;
      kernel(part, rows * block / blocks, rows * (block + 1) / blocks);
    }
  });
  const auto add_up = [&](const std::vector<T>& sums, Tensor& to) {
    T* out = static_cast<T*>(to.mutable_data_ptr());
    for (int64_t j = 0; j < classes; ++j) {
      out[j] = 0;
      for (int64_t block = 0; block < blocks; ++block) out[j] += sums[block * classes + j];
    }
  };
  if (need_scale) add_up(scale_sums, d_scale);
  if (need_bias) add_up(bias_sums, d_bias);
  return {d_input, d_scale, d_bias};
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

int64_t select_isa(int64_t wanted) { return ltk::select_instruction_set(int(wanted)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("cross_entropy_forward(" LTK_CROSS_ENTROPY_ARGUMENTS ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor grad, Tensor state, " LTK_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool need_class_scale, bool need_class_bias, bool inplace) -> (Tensor, Tensor, Tensor)");
  m.def("select_isa(int wanted) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CompositeExplicitAutograd, m) { m.impl("select_isa", TORCH_BOX(&select_isa)); }
