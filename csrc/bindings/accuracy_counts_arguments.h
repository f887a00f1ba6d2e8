// What accuracy_counts' bindings of every device share: the op's schema, and its arguments checked and turned into a
// call.
#pragma once

#include "bindings/cross_entropy_arguments.h"
#include "common/accuracy_counts.h"

#define LTK_ACCURACY_COUNTS_ARGUMENTS \
  "Tensor input, Tensor target, Tensor(a!) correct, Tensor(b!) total, int top_k, int ignore_index"

namespace ltk::bindings {

// Rows that all follow one another at the same distance are found without a division.
inline Layout at_one_distance(const Layout& l) {
  return l.stride_outer == l.inner * l.stride_inner ? Layout{1, l.stride_inner, l.stride_class, 0} : l;
}

// A direct call of the op has been checked by nobody.
inline AccuracyCall accuracy_call(const Tensor& input, const Tensor& target, Tensor& correct, Tensor& total,
                                  int64_t top_k, int64_t ignore_index) {
  const auto expect = [](bool good, const char* what) {
    if (!good) fail(std::string("accuracy_counts: expected ") + what);
  };
  const Device device = device_of(input);
  AccuracyCall call{};
  call.input_type = element_type(input);
  call.target_type = element_type(target);
  const bool of_labels = !is_floating(call.input_type);
  expect(of_labels ? input.dim() == 1 : (input.dim() == 2 || input.dim() == 3) && input.size(1) >= 1,
         "logits (N, C) or (N, C, D) with C >= 1, or predicted labels (N,)");
  call.classes = of_labels ? correct.numel() : input.size(1);
  const auto counts = [&](const Tensor& tensor) {
    return tensor.dim() == 1 && tensor.numel() == call.classes && tensor.scalar_type() == ScalarType::Long &&
           tensor.is_contiguous() && device_of(tensor) == device;
  };
  expect(call.classes >= 1 && counts(correct) && counts(total), "correct and total: contiguous int64 (C,)");
  call.rows = of_labels ? input.numel() : input.numel() / call.classes;
  const bool fits = target.dim() == (of_labels ? 1 : input.dim() - 1) && target.numel() == call.rows &&
                    target.size(0) == input.size(0);
  expect(fits && !is_floating(call.target_type) && device_of(target) == device,
         "a label for each row on the device of the input");
  expect(top_k >= 1 && top_k <= (of_labels ? 1 : call.classes), "top_k from 1 to C, 1 with predicted labels");
  call.top_k = top_k;
  call.ignore_index = ignore_index;
  call.input = input.const_data_ptr();
  call.input_layout = of_labels ? row_layout(input) : layout(input);
  call.target = target.const_data_ptr();
  call.target_layout = at_one_distance(row_layout(target));
  call.correct = static_cast<int64_t*>(correct.mutable_data_ptr());
  call.total = static_cast<int64_t*>(total.mutable_data_ptr());
  return call;
}

}  // namespace ltk::bindings
