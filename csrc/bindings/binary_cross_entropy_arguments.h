// What binary_cross_entropy's bindings of every device share: the arguments in the order of the schema, and their
// checks.
#pragma once

#include "bindings/cross_entropy_arguments.h"
#include "common/binary_terms.h"

namespace ltk::bindings {

struct BinaryArguments {
  const Tensor& input;
  const Tensor& target;
  const OptionalTensor &weight, &pos_weight, &neg_weight, &foreground_keep, &background_keep, &sample_weight,
      &draw_step;
  int64_t ignore_index, background_index;
  double alpha_pos, alpha_neg, gamma_pos, gamma_neg, clip;
  bool scored;
  double score_logit;
  bool row_draws, column_sums;
  int64_t seed;

  template <class T>
  BinaryOptions<T> options() const {
    return {T(alpha_pos), T(alpha_neg), T(gamma_pos), T(gamma_neg), T(clip), T(score_logit), scored, row_draws};
  }
  int64_t states() const { return (column_sums ? 2 * input.size(1) : 0) + 1; }
};

// As check_sizes of cross_entropy: a direct call of the op has not been checked at all.
template <class T>
void check_sizes(const BinaryArguments& a) {
  if ((a.input.dim() != 2 && a.input.dim() != 3) || a.input.size(1) == 0 || !is_floating(element_type(a.input)))
    fail("expected floating logits (N, C) or (N, C, D) with C >= 1");
  const int64_t classes = a.input.size(1), rows = a.input.numel() / classes;
  const Device device = device_of(a.input);
  const auto is_table = [&](const OptionalTensor& parameter, int64_t count) {
    return !parameter || (parameter->numel() == count && parameter->scalar_type() == type_of<T>() &&
                          parameter->is_contiguous() && device_of(*parameter) == device);
  };
  const bool floating = is_floating(element_type(a.target));
  const bool good = is_table(a.weight, classes) && is_table(a.pos_weight, classes) && is_table(a.neg_weight, classes) &&
                    is_table(a.foreground_keep, classes) && is_table(a.background_keep, classes) &&
                    is_table(a.sample_weight, rows) &&
                    (!a.draw_step || (a.draw_step->numel() == 1 && a.draw_step->scalar_type() == ScalarType::Long &&
                                      device_of(*a.draw_step) == device)) &&
                    device_of(a.target) == device &&
                    (floating ? same_shape(a.target, a.input) : a.target.numel() == rows) && !(floating && a.weight);
  if (!good) fail("a target or parameter has another size, type or device than the logits ask for");
}

#define LTK_BINARY_CROSS_ENTROPY_ARGUMENTS                                                                         \
  "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? neg_weight, Tensor? foreground_keep, " \
  "Tensor? background_keep, Tensor? sample_weight, Tensor? draw_step, int ignore_index, int reduction, "           \
  "int background_index, float alpha_pos, float alpha_neg, float gamma_pos, float gamma_neg, float clip, "         \
  "bool scored, float score_logit, bool row_draws, bool column_sums, bool empty_zero, int seed"

// The parameters of a registered function that these are.
#define LTK_BINARY_CROSS_ENTROPY_PARAMETERS                                                                          \
  Tensor input, Tensor target, OptionalTensor weight, OptionalTensor pos_weight, OptionalTensor neg_weight,          \
      OptionalTensor foreground_keep, OptionalTensor background_keep, OptionalTensor sample_weight,                  \
      OptionalTensor draw_step, int64_t ignore_index, int64_t reduction, int64_t background_index, double alpha_pos, \
      double alpha_neg, double gamma_pos, double gamma_neg, double clip, bool scored, double score_logit,            \
      bool row_draws, bool column_sums, bool empty_zero, int64_t seed

#define LTK_BINARY_CROSS_ENTROPY_PASSED                                                                    \
  {input,         target,    weight,       pos_weight,       neg_weight, foreground_keep, background_keep, \
   sample_weight, draw_step, ignore_index, background_index, alpha_pos,  alpha_neg,       gamma_pos,       \
   gamma_neg,     clip,      scored,       score_logit,      row_draws,  column_sums,     seed}

}  // namespace ltk::bindings
