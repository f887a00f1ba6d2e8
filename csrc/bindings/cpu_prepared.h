// A call of cross_entropy as the CPU kernels take it: parameters prepared once a call (O(N + C)), bad values refused.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "bindings/cross_entropy_arguments.h"
#include "cpu/cross_entropy.h"

namespace ltk::bindings {

enum Reduction : int64_t { none, sum, mean_weight, mean_count };  // ltkernels/ops/options.py

inline Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  return allocate(sizes, strides, type, {aoti_torch_device_type_cpu(), 0});
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
  int64_t reached = 0;  // classes that smoothing reaches

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

// Labels as the kernels read them.
inline Tensor at_unit_stride(const Tensor& labels) {
  return labels.is_contiguous() ? labels : torch::stable::contiguous(labels);
}

// Any upstream gradient: one value, or one a row with any strides (expanded, sliced).
template <class T>
std::vector<T> upstream_of(const Tensor& input, const Tensor& grad) {
  const bool of_rows = grad.dim() == input.dim() - 1 && grad.size(0) == input.size(0) &&
                       (grad.dim() == 1 || grad.size(1) == input.size(2));
  if (grad.scalar_type() != type_of<T>() || !(grad.dim() == 0 || of_rows))
    fail("grad or state are not those of these logits");
  const T* from = static_cast<const T*>(grad.const_data_ptr());
  if (grad.dim() == 0) return {*from};
  const int64_t rows = grad.numel(), inner = grad.dim() == 2 ? grad.size(1) : 1;
  std::vector<T> upstream(rows);
  for (int64_t row = 0; row < rows; ++row)
    upstream[row] = from[row / inner * grad.stride(0) + (grad.dim() == 2 ? row % inner * grad.stride(1) : 0)];
  return upstream;
}

// Runs run(call, begin, end) over all rows and returns the sums over rows of the gradients of scale and bias that are
// needed: over blocks of rows that do not depend on the number of threads, added in their order.
template <class T, class Run>
std::pair<Tensor, Tensor> backward_rows(const CrossEntropyCall<T>& call, int64_t classes, bool need_scale,
                                        bool need_bias, int64_t grain, Run run) {
  const int64_t rows = call.rows;
  const auto vector = [&](bool needed) { return allocate({needed ? classes : 0}, {1}, type_of<T>()); };
  Tensor d_scale = vector(need_scale), d_bias = vector(need_bias);
  if (!need_scale && !need_bias) {
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(call, begin, end); });
    return {d_scale, d_bias};
  }
  const int64_t blocks = std::clamp<int64_t>(rows / 16, 1, 16);
  std::vector<T> scale_sums(need_scale ? blocks * classes : 0), bias_sums(need_bias ? blocks * classes : 0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      CrossEntropyCall<T> part = call;
      if (need_scale) part.scale_sums = scale_sums.data() + block * classes;
      if (need_bias) part.bias_sums = bias_sums.data() + block * classes;
      run(part, rows * block / blocks, rows * (block + 1) / blocks);
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
  return {d_scale, d_bias};
}

}  // namespace ltk::bindings
