// What row_cross_entropy's bindings of every device share: the arguments in the order of the schema, and their checks.
#pragma once

#include "bindings/cross_entropy_arguments.h"
#include "common/row_adjustments.h"

namespace ltk::bindings {

struct RowArguments {
  const Tensor& input;
  const Tensor& target;
  const OptionalTensor &second_target, &lam, &weight, &class_scale, &class_bias, &class_margin, &class_smoothing,
      &sample_weight, &row_gate, &feature_norm, &pair, &pair_step;
  int64_t ignore_index;
  double label_smoothing;
  bool off_target;
  double scale;
  int64_t margin_type;
  double focal_gamma;
  bool focal_weighted, focal_detached;
  double influence_alpha, influence_eps, z_loss;
  int64_t pair_term;
  double pair_p, pair_q, pair_eps;
  int64_t seed;

  bool two_labels() const { return second_target.has_value(); }
  bool seesaw() const { return PairTerm(pair_term) == PairTerm::seesaw; }
  int64_t states(int64_t rows) const {
    return RowStates<float>::count(rows, two_labels(), seesaw(), row_gate.has_value());
  }
};

// As check_sizes of cross_entropy: a direct call of the op has not been checked at all.
template <class T>
void check_sizes(const RowArguments& a) {
  if ((a.input.dim() != 2 && a.input.dim() != 3) || a.input.size(1) == 0 || !is_floating(element_type(a.input)))
    fail("expected floating logits (N, C) or (N, C, D) with C >= 1");
  const int64_t classes = a.input.size(1), rows = a.input.numel() / classes;
  const Device device = device_of(a.input);
  const auto here = [&](const Tensor& tensor) { return device_of(tensor) == device; };
  const auto is_table = [&](const OptionalTensor& parameter, int64_t count) {
    return !parameter || (parameter->numel() == count && parameter->scalar_type() == type_of<T>() &&
                          parameter->is_contiguous() && here(*parameter));
  };
  const auto is_number = [&](const OptionalTensor& parameter) {
    return parameter && parameter->numel() == 1 && parameter->scalar_type() == type_of<T>() &&
           device_of(*parameter).type == aoti_torch_device_type_cpu();
  };
  const auto are_labels = [&](const Tensor& target) {
    return here(target) && target.numel() == rows && !is_floating(element_type(target));
  };
  const PairTerm pair = PairTerm(a.pair_term);
  bool good = is_table(a.weight, classes) && is_table(a.class_scale, classes) && is_table(a.class_bias, classes) &&
              is_table(a.class_smoothing, classes) && is_table(a.sample_weight, rows) && is_table(a.row_gate, rows) &&
              is_table(a.feature_norm, rows) && (is_number(a.class_margin) || is_table(a.class_margin, classes)) &&
              (is_number(a.lam) || is_table(a.lam, rows)) && are_labels(a.target);
  if (a.second_target)
    good = good && a.lam && are_labels(*a.second_target) && same_shape(*a.second_target, a.target) &&
           a.second_target->scalar_type() == a.target.scalar_type() && pair == PairTerm::none;
  good = good && a.pair.has_value() == (pair != PairTerm::none) &&
         is_table(a.pair, pair == PairTerm::table ? classes * classes : classes);
  if (pair == PairTerm::drop)
    good = good && a.pair_step && a.pair_step->numel() == 1 && a.pair_step->scalar_type() == ScalarType::Long &&
           here(*a.pair_step);
  if (!good) fail("a target or parameter has another size, type or device than the logits ask for");
}

#define LTK_ROW_CROSS_ENTROPY_ARGUMENTS                                                                             \
  "Tensor input, Tensor target, Tensor? second_target, Tensor? lam, Tensor? weight, Tensor? class_scale, "          \
  "Tensor? class_bias, Tensor? class_margin, Tensor? class_smoothing, Tensor? sample_weight, Tensor? row_gate, "    \
  "Tensor? feature_norm, Tensor? pair, Tensor? pair_step, int ignore_index, int reduction, float label_smoothing, " \
  "bool off_target, float scale, int margin_type, float focal_gamma, bool focal_weighted, bool focal_detached, "    \
  "float influence_alpha, float influence_eps, float z_loss, bool empty_zero, int pair_term, float pair_p, "        \
  "float pair_q, float pair_eps, int seed"

// The parameters of a registered function that these are.
#define LTK_ROW_CROSS_ENTROPY_PARAMETERS                                                                          \
  Tensor input, Tensor target, OptionalTensor second_target, OptionalTensor lam, OptionalTensor weight,           \
      OptionalTensor class_scale, OptionalTensor class_bias, OptionalTensor class_margin,                         \
      OptionalTensor class_smoothing, OptionalTensor sample_weight, OptionalTensor row_gate,                      \
      OptionalTensor feature_norm, OptionalTensor pair, OptionalTensor pair_step, int64_t ignore_index,           \
      int64_t reduction, double label_smoothing, bool off_target, double scale, int64_t margin_type,              \
      double focal_gamma, bool focal_weighted, bool focal_detached, double influence_alpha, double influence_eps, \
      double z_loss, bool empty_zero, int64_t pair_term, double pair_p, double pair_q, double pair_eps, int64_t seed

#define LTK_ROW_CROSS_ENTROPY_PASSED \
  {input,                            \
   target,                           \
   second_target,                    \
   lam,                              \
   weight,                           \
   class_scale,                      \
   class_bias,                       \
   class_margin,                     \
   class_smoothing,                  \
   sample_weight,                    \
   row_gate,                         \
   feature_norm,                     \
   pair,                             \
   pair_step,                        \
   ignore_index,                     \
   label_smoothing,                  \
   off_target,                       \
   scale,                            \
   margin_type,                      \
   focal_gamma,                      \
   focal_weighted,                   \
   focal_detached,                   \
   influence_alpha,                  \
   influence_eps,                    \
   z_loss,                           \
   pair_term,                        \
   pair_p,                           \
   pair_q,                           \
   pair_eps,                         \
   seed}

}  // namespace ltk::bindings
