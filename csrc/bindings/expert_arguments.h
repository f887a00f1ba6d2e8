// What the bindings of several experts' ops share on every device: the arguments in the order of the schemas, checks.
#pragma once

#include "bindings/cross_entropy_arguments.h"

namespace ltk::bindings {

// The rows of (E, N, C) logits, expert by expert: row e N + i is sample i of expert e.
inline Layout expert_layout(const Tensor& tensor) {
  return {std::max<int64_t>(tensor.size(1), 1), tensor.stride(0), tensor.stride(2), tensor.stride(1)};
}

inline void check_experts(const Tensor& input) {
  if (input.dim() != 3 || input.size(0) == 0 || input.size(2) == 0 || !is_floating(element_type(input)))
    fail("expected floating logits (E, N, C) with E >= 1 and C >= 1");
}

// A parameter of `count` numbers in the type of the computation.
template <class T>
bool fits(const OptionalTensor& parameter, int64_t count, const Device& device) {
  return !parameter || (parameter->numel() == count && parameter->scalar_type() == type_of<T>() &&
                        parameter->is_contiguous() && device_of(*parameter) == device);
}

struct ExpertCrossEntropyArguments {
  const Tensor &input, &target;
  const OptionalTensor &weight, &class_scale, &class_bias, &class_margin, &temperature, &sample_weight, &teacher;
  int64_t ignore_index, reduction;
  double scale, diversity, distillation, distillation_scale;
  bool aggregate, empty_zero;

  int64_t experts() const { return input.size(0); }
  int64_t rows() const { return input.size(1); }
  int64_t classes() const { return input.size(2); }
  // The mean if it is wanted, 5 E + 6 a sample, a denominator an expert and one more: ltkernels/ops/.
  int64_t means() const { return aggregate ? rows() * classes() : 0; }
  int64_t states() const { return means() + rows() * (5 * experts() + 6) + experts() + 1; }
};

template <class T>
void check_sizes(const ExpertCrossEntropyArguments& a) {
  check_experts(a.input);
  const Device device = device_of(a.input);
  const int64_t table = a.experts() * a.classes();
  const bool good =
      a.target.dim() == 1 && a.target.numel() == a.rows() && !is_floating(element_type(a.target)) &&
      device_of(a.target) == device && fits<T>(a.weight, table, device) && fits<T>(a.class_scale, table, device) &&
      fits<T>(a.class_bias, table, device) && fits<T>(a.class_margin, table, device) &&
      fits<T>(a.temperature, a.classes() + 1, device) && fits<T>(a.sample_weight, a.rows(), device) &&
      (!a.teacher || (a.teacher->dim() == 2 && a.teacher->size(0) == a.rows() && a.teacher->size(1) == a.classes() &&
                      is_floating(element_type(*a.teacher)) && device_of(*a.teacher) == device));
  if (!good) fail("a target, teacher or parameter has another size, type or device than the logits ask for");
}

#define LTK_EXPERT_CROSS_ENTROPY_ARGUMENTS                                                                       \
  "Tensor input, Tensor target, Tensor? weight, Tensor? class_scale, Tensor? class_bias, Tensor? class_margin, " \
  "Tensor? temperature, Tensor? sample_weight, Tensor? teacher, int ignore_index, int reduction, float scale, "  \
  "float diversity, float distillation, float distillation_scale, bool aggregate, bool empty_zero"

#define LTK_EXPERT_CROSS_ENTROPY_PARAMETERS                                                                          \
  Tensor input, Tensor target, OptionalTensor weight, OptionalTensor class_scale, OptionalTensor class_bias,         \
      OptionalTensor class_margin, OptionalTensor temperature, OptionalTensor sample_weight, OptionalTensor teacher, \
      int64_t ignore_index, int64_t reduction, double scale, double diversity, double distillation,                  \
      double distillation_scale, bool aggregate, bool empty_zero

#define LTK_EXPERT_CROSS_ENTROPY_PASSED                                                                             \
  {                                                                                                                 \
      input,     target,       weight,    class_scale, class_bias, class_margin, temperature,        sample_weight, \
      teacher,   ignore_index, reduction, scale,       diversity,  distillation, distillation_scale, aggregate,     \
      empty_zero}

struct AggregateExpertsArguments {
  const Tensor& input;
  const OptionalTensor& expert_weight;
  int64_t mode, weights, topk;

  int64_t experts() const { return input.size(0); }
  int64_t rows() const { return input.size(1); }
  int64_t classes() const { return input.size(2); }
  // Two numbers a sample and expert if the mean is not of logits, the best classes, their probabilities, 1.
  int64_t softmaxes() const { return mode == 0 ? 0 : 2 * experts() * rows(); }
  int64_t states() const { return softmaxes() + 2 * topk * rows() + 1; }
  int64_t weight_count() const {
    return weights == 0 ? 0 : weights == 1 ? experts() : experts() * (weights == 2 ? rows() : classes());
  }
};

template <class T>
void check_sizes(const AggregateExpertsArguments& a) {
  check_experts(a.input);
  if (a.mode < 0 || a.mode > 2 || a.weights < 0 || a.weights > 3 || a.topk < 0 || a.topk > a.classes() ||
      (a.weights == 0) == bool(a.expert_weight) || !fits<T>(a.expert_weight, a.weight_count(), device_of(a.input)))
    fail("a weight has another size, type or device than the logits ask for");
}

#define LTK_AGGREGATE_EXPERTS_ARGUMENTS "Tensor input, Tensor? expert_weight, int mode, int weights, int topk"

}  // namespace ltk::bindings
