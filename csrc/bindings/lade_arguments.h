// What lade's bindings of every device share: the arguments in the order of the schema, and their checks.
#pragma once

#include "bindings/cross_entropy_arguments.h"

namespace ltk::bindings {

struct LadeArguments {
  const Tensor& input;
  const Tensor& target;
  const Tensor& prior;
  const OptionalTensor &class_bias, &class_offset, &row_offset;
  int64_t ignore_index;
  double remine_lambda, weight;
  bool with_ce;

  int64_t classes() const { return input.size(1); }
  int64_t rows() const { return input.numel() / classes(); }
  // Three numbers a row, three a class, 1 / N: ltkernels/ops/lade.py.
  int64_t states() const { return 3 * rows() + 3 * classes() + 1; }
  // As of cross_entropy.
  Arguments shared() const {
    static const OptionalTensor none;
    return {input, target, none, none, class_bias, none, none, ignore_index, 0.0, 1.0, 0.0, false, false, 0.0};
  }
};

template <class T>
void check_sizes(const LadeArguments& a) {
  check_sizes<T>(a.shared());
  const auto is_table = [&](const Tensor& tensor) {
    return tensor.numel() == a.classes() && tensor.scalar_type() == type_of<T>() && tensor.is_contiguous() &&
           device_of(tensor) == device_of(a.input);
  };
  if (is_floating(element_type(a.target)) || !is_table(a.prior) || (a.class_offset && !is_table(*a.class_offset)) ||
      (a.row_offset && !is_table(*a.row_offset)))
    fail("a target or table has another size, type or device than the logits ask for");
}

#define LTK_LADE_ARGUMENTS                                                                                    \
  "Tensor input, Tensor target, Tensor prior, Tensor? class_bias, Tensor? class_offset, Tensor? row_offset, " \
  "int ignore_index, int reduction, float remine_lambda, float weight, bool with_ce"

}  // namespace ltk::bindings
