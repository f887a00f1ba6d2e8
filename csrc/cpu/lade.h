// What the torch-free CPU core of LADE is asked to do: a softmax along the rows and a log-sum-exp down the columns.
#pragma once

#include "cpu/cross_entropy.h"

namespace ltk {

// What a forward leaves of a row: the maximum of u = z + b, 1 / sum e^(u - max), p - 1 at the label.
template <class T>
struct LadeRow {
  T max, inverse_sum, at_label;
};

// One call: logits, labels, biases and the gradient as of cross_entropy. The rest of the base is not used.
template <class T>
struct LadeCall : CrossEntropyCall<T> {
  bool with_ce = true, with_columns = true;
  const T* row_offset = nullptr;  // by the row's label
  LadeRow<T>* row_states = nullptr;
  // Of each class, once all rows are seen: the gradient's factor of e^(z + row_offset - log_sum), and what the label
  // loses.
  const T *column_factor = nullptr, *column_log_sum = nullptr, *label_loss = nullptr;
};

// Sums down the columns over the rows of a forward's range: maximum and sum of e^(z + row_offset - max), and of the
// rows with the class as their label the logits and the number.
template <class T>
struct LadeColumns {
  T *max, *sum, *own, *count;
};

template <class T>
struct LadeKernels {
  void (*forward)(const LadeCall<T>&, const LadeColumns<T>&, int64_t begin, int64_t end);
  void (*backward)(const LadeCall<T>&, int64_t begin, int64_t end);
};

struct LadeTable {
  LadeKernels<float> single;
  LadeKernels<double> real;  // double precision
};

}  // namespace ltk
