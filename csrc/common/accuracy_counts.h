// Right predictions of each class: what a call is asked for, and which of two logits comes first. Torch-free, for host
// and device.
#pragma once

#include "common/rows.h"

namespace ltk {

// Rows are predicted by logits, or by labels of an integer type.
struct AccuracyCall {
  int64_t rows, classes, top_k, ignore_index;
  const void* input;
  ElementType input_type;
  Layout input_layout;  // of labels: of a value a row
  const void* target;
  ElementType target_type;
  Layout target_layout;
  int64_t *correct, *total;  // [classes], added to
};

// A label, and whether its row counts.
struct CountedLabel {
  int64_t y;
  bool ignored, in_range;
};

LTK_HOST_DEVICE CountedLabel counted_label(const AccuracyCall& call, int64_t row) {
  const int64_t y = label_at(call.target, call.target_type, call.target_layout.offset(row));
  const bool beyond = call.target_type == ElementType::u64 && y < 0;  // 2^63 or more
  return {y, y == call.ignore_index && !beyond, y >= 0 && y < call.classes};
}

LTK_HOST_DEVICE int64_t predicted_label(const AccuracyCall& call, int64_t row) {
  return label_at(call.input, call.input_type, call.input_layout.offset(row));
}

// Whether the logit x of a class comes before the label's, `own`: it is larger, or as large and of an earlier class.
// NaN is above every number and equal to NaN.
template <class T>
LTK_HOST_DEVICE bool comes_before(T x, bool earlier, T own) {
  if (own != own) return earlier && x != x;
  return earlier ? !(x < own) : !(x <= own);  // not x >= own: true of NaN too
}

}  // namespace ltk
