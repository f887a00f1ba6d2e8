// The kernels of binary_cross_entropy: one launch each way, a term at a time.
//
// Forward: threads along a row add up its loss. Sums of columns are taken by blocks of their own, side by side with
// those, each with a chunk of the columns and a split of the rows; of a chunk the split that comes last adds up, in the
// order of the splits. Backward: elementwise.
#pragma once

#include <cmath>

#include "cuda/batch.cuh"
#include "cuda/binary_cross_entropy.h"
#include "cuda/cross_entropy_any.cuh"

namespace ltk::cuda {

// What the columns of a row share.
template <class T>
struct BinaryRow {
  int64_t r, y;  // y: the positive column, or -1
  bool ignored, background;
  int error;
  int64_t target_offset;  // of floating targets, else -1
  T factor;               // sample weight times weight; NaN for a wrong label

  LTK_DEVICE BinaryRow(const BinaryCall<T>& call, int64_t r)
      : r(r), y(-1), ignored(false), background(false), error(0), target_offset(-1), factor(T(1)) {
    if (is_floating(call.target_type)) {
      target_offset = call.target_layout.offset(r);
    } else {
      const Label label = check_range(call, raw_label(call, r));
      const bool beyond = call.target_type == ElementType::u64 && label.y < 0;
      ignored = label.ignored;
      background = !ignored && !beyond && call.background_index >= 0 && label.y == call.background_index;
      error = background ? 0 : label.error;
      if (!ignored && label.error == 0) y = label.y;
    }
    if (call.row_weight != nullptr) factor = call.row_weight[r];
    if (call.weight != nullptr && y >= 0) factor *= call.weight[y];
    if (error != 0) factor = T(NAN);
  }
  LTK_DEVICE T target(const BinaryCall<T>& call, int64_t j) const {
    return probability_at<T>(call.target, call.target_type, target_offset + j * call.target_layout.stride_class);
  }
  // Whether this thread's columns have a positive: background is known when all have said so.
  LTK_DEVICE bool sees_positive(const BinaryCall<T>& call, int first, int step) const {
    for (int64_t j = first; j < call.classes; j += step)
      if (target(call, j) > T(0)) return true;
    return false;
  }
  LTK_DEVICE bool is_kept(const BinaryCall<T>& call, int64_t j, T z) const {
    const T* keep = call.keep[background ? 1 : 0];
    if (keep == nullptr) return true;
    const T probability = keep[j];
    if (probability >= T(1) || (call.terms.scored && z >= call.terms.score_logit)) return true;
    if (probability <= T(0)) return false;
    const uint32_t step = call.draw_step != nullptr ? uint32_t(*call.draw_step) : 0;
    const float draw =
        call.terms.row_draws ? row_draw(r, step, call.seed) : element_draw(r, j, call.classes, step, call.seed);
    return T(draw) < probability;
  }
};

template <class T>
LTK_DEVICE bool needs_kind(const BinaryCall<T>& call) {
  return is_floating(call.target_type) && (call.keep[0] != nullptr || call.keep[1] != nullptr);
}

// Loss, and the sizes of the derivatives of the positive and the negative part, of one element.
template <class T>
struct Element {
  T loss, positive, negative;
};

template <class T>
LTK_DEVICE Element<T> element(const BinaryCall<T>& call, const BinaryRow<T>& row, int64_t j, T z) {
  const T t = row.target_offset >= 0 ? row.target(call, j) : j == row.y ? T(1) : T(0);
  Element<T> out{T(0), T(0), T(0)};
  if (t != T(0)) {
    T c = row.factor * call.terms.alpha_pos * t;
    if (call.pos_weight != nullptr) c *= call.pos_weight[j];
    const BinaryTerm<T> term = negative_term<T>(-z, call.terms.gamma_pos, T(0));
    out.loss = masked_term(c, term.loss);
    out.positive = c * term.slope;
  }
  if (t != T(1)) {
    T c = row.factor * call.terms.alpha_neg * (T(1) - t);
    if (call.neg_weight != nullptr) c *= call.neg_weight[j];
    if (!row.is_kept(call, j, z)) c = T(0);
    const BinaryTerm<T> term = negative_term<T>(z, call.terms.gamma_neg, call.terms.clip);
    out.loss += masked_term(c, term.loss);
    out.negative = c * term.slope;
  }
  return out;
}

template <class E, class T, int a_row>
LTK_DEVICE void binary_rows(const BinaryCall<T>& call, int64_t block, Totals* totals) {
  constexpr int rows = any_threads(a_row) / a_row;  // of a block at a time
  const int first = simt::thread() % a_row;
  for (int64_t r = block * rows + simt::thread() / a_row; r < call.rows; r += call.row_blocks * rows) {
    BinaryRow<T> row(call, r);
    if (row.error != 0 && first == 0) *call.error = row.error;
    if (needs_kind(call)) row.background = row_sum<a_row>(row.sees_positive(call, first, a_row) ? T(1) : T(0)) == T(0);
    T loss = T(0);
    if (!row.ignored) {
      const AnyRow<E, T> logits(call, r);
      for (int64_t j = first; j < call.classes; j += a_row) loss += element(call, row, j, logits.logit(j)).loss;
      loss = row_sum<a_row>(loss);
    }
    if (first != 0) continue;
    if (call.reduction == Reduction::none) call.loss[r] = loss;
    totals->a += double(loss);
    totals->b += row.ignored ? 0.0 : 1.0;
  }
}

// The columns of a chunk, one a thread, in the rows of a split.
template <class E, class T>
LTK_DEVICE void binary_columns(const BinaryCall<T>& call, int64_t chunk, int64_t split) {
  const int64_t j = chunk * simt::threads() + simt::thread();
  T positive = T(0), negative = T(0);
  const int64_t end = call.rows * (split + 1) / call.splits;
  for (int64_t r = call.rows * split / call.splits; r < end; ++r) {
    BinaryRow<T> row(call, r);
    if (needs_kind(call)) {  // every chunk looks at the whole row: rare
      const Totals seen = block_sum({row.sees_positive(call, simt::thread(), simt::threads()) ? 1.0 : 0.0, 0.0});
      row.background = seen.a == 0.0;
    }
    if (row.ignored || j >= call.classes) continue;
    const Element<T> e = element(call, row, j, AnyRow<E, T>(call, r).logit(j));
    positive += e.positive;
    negative += e.negative;
  }
  if (j < call.classes) {
    call.column_partials[2 * split * call.classes + j] = positive;
    call.column_partials[(2 * split + 1) * call.classes + j] = negative;
  }
  if (!last_block(call.tickets + 1 + chunk, call.splits) || j >= call.classes) return;
  positive = negative = T(0);
  for (int64_t s = 0; s < call.splits; ++s) {
    positive += call.column_partials[2 * s * call.classes + j];
    negative += call.column_partials[(2 * s + 1) * call.classes + j];
  }
  call.state[j] = positive;
  call.state[call.classes + j] = negative;
}

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), any_blocks<T>(a_row))
binary_forward_kernel(const BinaryCall<T> call) {
  const int64_t column_blocks = call.chunks * call.splits;
  if (simt::block() < column_blocks) {
    binary_columns<E, T>(call, simt::block() % call.chunks, simt::block() / call.chunks);
    return;
  }
  const int64_t block = simt::block() - column_blocks;
  Totals mine{0.0, 0.0};
  binary_rows<E, T, a_row>(call, block, &mine);
  T* inverse_denominator = call.inverse_denominator();
  if (call.reduction == Reduction::none) {
    if (block == 0 && simt::thread() == 0) *inverse_denominator = T(1);
    return;
  }
  const Totals total = block_sum(mine);
  Totals* partials = reinterpret_cast<Totals*>(call.partials);
  if (simt::thread() == 0) partials[block] = total;
  if (!last_block(call.tickets, call.row_blocks)) return;
  mine = {0.0, 0.0};
  for (int64_t b = simt::thread(); b < call.row_blocks; b += simt::threads()) {
    mine.a += partials[b].a;
    mine.b += partials[b].b;
  }
  const Totals all = block_sum(mine);
  if (simt::thread() != 0) return;
  double inverse = 1.0;
  if (call.reduction != Reduction::sum) inverse = all.b == 0.0 && call.empty_zero ? 0.0 : 1.0 / all.b;
  *inverse_denominator = T(inverse);
  *call.loss = T(inverse == 0.0 ? 0.0 : all.a * inverse);
}

template <class E, class T, int a_row>
LTK_KERNEL(any_threads(a_row), any_blocks<T>(a_row))
binary_backward_kernel(const BinaryCall<T> call) {
  T inverse = *call.inverse_denominator();
  if (inverse < T(0)) {  // a state of the reference
    *call.error = foreign_state;
    inverse = T(NAN);
  }
  constexpr int rows = any_threads(a_row) / a_row;
  const int first = simt::thread() % a_row;
  for (int64_t r = simt::block() * rows + simt::thread() / a_row; r < call.rows; r += simt::blocks() * rows) {
    BinaryRow<T> row(call, r);
    if (needs_kind(call)) row.background = row_sum<a_row>(row.sees_positive(call, first, a_row) ? T(1) : T(0)) == T(0);
    const AnyRow<E, T> logits(call, r);
    const T upstream = inverse * call.upstream[call.upstream_layout.offset(r)];
    E* out = static_cast<E*>(call.gradient) + call.gradient_layout.offset(r);
    for (int64_t j = first; j < call.classes; j += a_row) {
      T d = T(0);
      if (!row.ignored) {
        const Element<T> e = element(call, row, j, logits.logit(j));
        d = (e.negative - e.positive) * upstream;
      }
      narrow(out + j * call.gradient_layout.stride_class, d);
    }
  }
}

}  // namespace ltk::cuda
