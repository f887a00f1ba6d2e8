// What cross_entropy's bindings of every device share: tensors become pointers and layouts.
#pragma once

#include <algorithm>

#include "bindings/tensors.h"
#include "common/rows.h"

namespace ltk::bindings {

inline ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return ElementType::f64;
    case ScalarType::Float:
      return ElementType::f32;
    case ScalarType::BFloat16:
      return ElementType::bf16;
    case ScalarType::Half:
      return ElementType::f16;
    case ScalarType::Long:
      return ElementType::i64;
    case ScalarType::Int:
      return ElementType::i32;
    case ScalarType::Short:
      return ElementType::i16;
    case ScalarType::Char:
      return ElementType::i8;
    case ScalarType::UInt64:
      return ElementType::u64;
    case ScalarType::UInt32:
      return ElementType::u32;
    case ScalarType::UInt16:
      return ElementType::u16;
    case ScalarType::Byte:
      return ElementType::u8;
    default:
      fail("unsupported element type");
  }
}

// Of an (outer, C) or (outer, C, inner) tensor.
inline Layout layout(const Tensor& tensor) {
  const bool flat = tensor.dim() == 2;
  return {flat ? 1 : tensor.size(2), tensor.stride(0), tensor.stride(1), flat ? 0 : tensor.stride(2)};
}

// Of one value a row: (outer,) or (outer, inner); the same value for all rows if there is but one.
inline Layout row_layout(const Tensor& tensor) {
  if (tensor.dim() == 0) return {1, 0, 0, 0};
  if (tensor.dim() == 1) return {1, tensor.stride(0), 0, 0};
  return {tensor.size(1), tensor.stride(0), 0, tensor.stride(1)};
}

// As at::empty_like: dense memory in the same order of dimensions.
inline Tensor dense_like(const Tensor& tensor) {
  if (tensor.dim() == 2 && tensor.is_contiguous())
    return allocate({tensor.size(0), tensor.size(1)}, {tensor.size(1), 1}, tensor.scalar_type(), device_of(tensor));
  return torch::stable::empty_like(tensor);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

template <class T>
constexpr ScalarType type_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// The arguments that forward and backward share, in the order of the schema.
struct Arguments {
  const Tensor& input;
  const Tensor& target;
  const OptionalTensor &weight, &class_scale, &class_bias, &class_margin, &sample_weight;
  int64_t ignore_index;
  double label_smoothing, scale, focal_gamma;
  bool focal_weighted, focal_detached;
  double z_loss;
};

// What Python checked at the forward may be other memory by the time of the backward, and a direct call of the op has
// not been checked at all.
template <class T>
void check_sizes(const Arguments& a) {
  if ((a.input.dim() != 2 && a.input.dim() != 3) || a.input.size(1) == 0 || !is_floating(element_type(a.input)))
    fail("expected floating logits (N, C) or (N, C, D) with C >= 1");
  const int64_t classes = a.input.size(1), rows = a.input.numel() / classes;
  const Device device = device_of(a.input);
  const auto here = [&](const Tensor& tensor) { return device_of(tensor) == device; };
  const auto fits = [&](const OptionalTensor& parameter, int64_t count) {
    return !parameter || (parameter->numel() == count && parameter->scalar_type() == type_of<T>() &&
                          parameter->is_contiguous() && here(*parameter));
  };
  const bool one_margin = a.class_margin && a.class_margin->numel() == 1 &&
                          a.class_margin->scalar_type() == type_of<T>() &&
                          device_of(*a.class_margin).type == aoti_torch_device_type_cpu();
  const bool good = fits(a.weight, classes) && fits(a.class_scale, classes) && fits(a.class_bias, classes) &&
                    (one_margin || fits(a.class_margin, classes)) && fits(a.sample_weight, rows) && here(a.target) &&
                    (is_floating(element_type(a.target)) ? same_shape(a.target, a.input) : a.target.numel() == rows);
  if (!good) fail("a target or parameter has another size, type or device than the logits ask for");
}

#define LTK_CROSS_ENTROPY_ARGUMENTS                                                                                 \
  "Tensor input, Tensor target, Tensor? weight, Tensor? class_scale, Tensor? class_bias, Tensor? class_margin, "    \
  "Tensor? sample_weight, int ignore_index, int reduction, float label_smoothing, float scale, float focal_gamma, " \
  "bool focal_weighted, bool focal_detached, float z_loss, bool empty_zero"

}  // namespace ltk::bindings
