// What distillation's bindings of every device share: the arguments in the order of the schema, and their checks.
#pragma once

#include "bindings/cross_entropy_arguments.h"

namespace ltk::bindings {

struct DistillationArguments {
  const Tensor &input, &teacher;
  const OptionalTensor &target, &student_bias, &teacher_bias, &class_bias, &sample_weight;
  int64_t ignore_index, reduction;
  double student_scale, teacher_scale, kd_weight, ce_weight;

  int64_t classes() const { return input.size(1); }
  int64_t rows() const { return input.numel() / classes(); }
  // Seven numbers a row, 1 / labels, 1 / rows: ltkernels/ops/distillation.py.
  int64_t states() const { return 7 * rows() + 2; }
};

// What Python checked at the forward may be other memory by the time of the backward.
template <class T>
void check_sizes(const DistillationArguments& a) {
  if ((a.input.dim() != 2 && a.input.dim() != 3) || a.input.size(1) == 0 || !is_floating(element_type(a.input)))
    fail("expected floating logits (N, C) or (N, C, D) with C >= 1");
  const Device device = device_of(a.input);
  const auto fits = [&](const OptionalTensor& parameter, int64_t count) {
    return !parameter || (parameter->numel() == count && parameter->scalar_type() == type_of<T>() &&
                          parameter->is_contiguous() && device_of(*parameter) == device);
  };
  const bool good =
      a.teacher.dim() == a.input.dim() && same_shape(a.teacher, a.input) && is_floating(element_type(a.teacher)) &&
      device_of(a.teacher) == device && fits(a.student_bias, a.classes()) && fits(a.teacher_bias, a.classes()) &&
      fits(a.class_bias, a.classes()) && fits(a.sample_weight, a.rows()) &&
      (!a.target ||
       (a.target->numel() == a.rows() && !is_floating(element_type(*a.target)) && device_of(*a.target) == device));
  if (!good) fail("a teacher, target or parameter has another size, type or device than the logits ask for");
}

#define LTK_DISTILLATION_ARGUMENTS                                                             \
  "Tensor input, Tensor teacher, Tensor? target, Tensor? student_bias, Tensor? teacher_bias, " \
  "Tensor? class_bias, Tensor? sample_weight, int ignore_index, int reduction, "               \
  "float student_scale, float teacher_scale, float kd_weight, float ce_weight"

// The parameters of a registered function that these are.
#define LTK_DISTILLATION_PARAMETERS                                                                              \
  Tensor input, Tensor teacher, OptionalTensor target, OptionalTensor student_bias, OptionalTensor teacher_bias, \
      OptionalTensor class_bias, OptionalTensor sample_weight, int64_t ignore_index, int64_t reduction,          \
      double student_scale, double teacher_scale, double kd_weight, double ce_weight

#define LTK_DISTILLATION_PASSED                                                                    \
  {input,        teacher,   target,        student_bias,  teacher_bias, class_bias, sample_weight, \
   ignore_index, reduction, student_scale, teacher_scale, kd_weight,    ce_weight}

}  // namespace ltk::bindings
