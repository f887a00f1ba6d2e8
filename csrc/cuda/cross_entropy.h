// What the GPU kernels of cross_entropy are asked to do. Torch-free; the kernels behind it are in cross_entropy_*.cuh,
// one .cu a type of logits.
#pragma once

#include <cstdint>

#include "common/row_loss.h"
#include "common/rows.h"

namespace ltk::cuda {

enum class Reduction : int { none, sum, mean_weight, mean_count };  // ltkernels/ops/options.py

// One call. T is the type of the computation and of every parameter: double for double logits, else float. Parameters
// are as the user gave them: adjusted logits are s (a_j x_j + b_j - m_y [j = y]).
template <class T>
struct Call {
  int64_t rows, classes;
  const void* input;
  Layout input_layout;
  const void* target;  // labels, or probabilities
  ElementType target_type;
  Layout target_layout;
  int64_t ignore_index;

  T uniform_scale;  // s
  const T* scale;   // a
  const T* bias;    // b
  const T* margin;  // m of each class, or null: `one_margin` for all
  T one_margin;
  const T* weight;        // w
  const T* row_weight;    // r
  RowOptions<T> options;  // smoothing_per_class and smoothing_total are those of all classes at weight 1: with a bias
                          // or weights the kernels count for themselves
  Reduction reduction;
  bool empty_zero;

  T* state;          // RowState[rows], with max not multiplied by s, then 1 / denominator
  T* loss;           // one value, or one a row
  double* partials;  // forward: two sums a block
  int* tickets;      // zeros, left as zeros
  int* error;        // a word that the host looks at: see Error

  const T* upstream;  // backward: 1 value or one a row
  Layout upstream_layout;
  void* gradient;  // or null
  Layout gradient_layout;
  T *scale_sums, *bias_sums;          // [classes] sums of dl/da_j and dl/db_j, or null
  T *scale_partials, *bias_partials;  // [row splits, classes]
};

// ltkernels/ops/gpu.py
enum Error : int {
  label_out_of_range = 1,
  label_of_absent_class = 2,
  foreign_state = 3,
  label_not_counted = 4,
  prediction_not_counted = 5
};

// The types of logits; defined with the kernels.
struct BFloat16;
struct Float16;

// E: the logits' type. Memory that a call needs for partial sums: pairs of doubles for a forward, rows of `classes`
// sums for each of scale and bias for a backward. `error` is null, or what CUDA says is wrong.
template <class E, class T>
int64_t forward_partials(const Call<T>& call, const char** error);
template <class E, class T>
int64_t column_splits(const Call<T>& call, const char** error);

// Start the kernel on a stream of the current device; null, or what CUDA says is wrong.
template <class E, class T>
const char* forward(const Call<T>& call, void* stream);
template <class E, class T>
const char* backward(const Call<T>& call, void* stream);

// Null if the current device can run this library's code, else what CUDA says is wrong.
const char* probe();

// Tickets that a backward with sums over rows takes.
constexpr int column_threads = 128;  // columns that share one
inline int64_t column_chunks(int64_t classes) { return (classes + column_threads - 1) / column_threads; }

}  // namespace ltk::cuda
