// LADE, compiled once per instruction set.
//
// A tile of rows is read once: along each row goes a softmax, and down the columns, a vector of classes at a time, a
// log-sum-exp over the tile's rows that joins what the rows before left, whose sum is rescaled where the maximum rises.
// An exponential a logit each way, and one more a tile and column. The gradient needs all rows first: it is a second
// pass.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/lade.h"
#include "cpu/row_tensors.h"
#include "cpu/simd.h"
#include "cpu/sweeps.h"

namespace ltk::LTK_ISA {
namespace {

// The labels' rows of a tile, with their offsets.
template <class T>
struct TileRow {
  const T* z;
  T offset;
};

// Joins the rows of a tile to the columns' maxima and sums.
template <class T>
void join_columns(const TileRow<T>* rows, int count, int64_t classes, const LadeColumns<T>& columns) {
  const Vec<T> lowest = splat(-infinity<T>);
  sweep<T>(0, classes, [&](int64_t j, auto load, auto store) {
    const Vec<T> before = load(columns.max + j, T(0));
    Vec<T> highest = before;
    for (int r = 0; r < count; ++r) highest = maximum<T>(highest, load(rows[r].z + j, T(0)) + rows[r].offset);
    const Vec<T> base = highest == lowest ? splat(T(0)) : highest;  // -inf - -inf is NaN
    Vec<T> sum = load(columns.sum + j, T(0)) * exponential(before - base);
    for (int r = 0; r < count; ++r) sum += exponential(load(rows[r].z + j, T(0)) + (rows[r].offset - base));
    store(columns.max + j, highest);
    store(columns.sum + j, sum);
  });
}

template <class T, Affine form>
LTK_INLINE Adjusted<T, form> biased(const LadeCall<T>& call, const T* z) {
  return {z, T(1), nullptr, call.bias};
}

// The row's softmax at its label; `e` is scratch.
template <class T, Affine form>
T row_loss(const LadeCall<T>& call, const T* z, int64_t y, T* e, LadeRow<T>* state) {
  const Adjusted<T, form> u = biased<T, form>(call, z);
  const T m = row_maximum(u, call.classes);
  const T sum = exponentiate(u, call.classes, m, static_cast<const T*>(nullptr), e, Ahead{}).exponentials;
  const T at_label = e[y];
  // By subtraction where that is exact enough, else added up again: p - 1 never cancels.
  const T others = T(2) * at_label <= sum ? sum - at_label : sum_without(e, call.classes, y);
  const T total = others + at_label;
  *state = {m, T(1) / total, -others / total};
  return at_label > others ? std::log1p(others / at_label) : m - u.at(y) + std::log(total);
}

template <class T, Affine form>
void forward(const LadeCall<T>& call, const LadeColumns<T>& columns, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  Tensors<T> tensors(call);
  Scratch<T> scratch(call.with_ce ? call.classes : 0);
  if (call.with_columns) {
    std::fill(columns.max, columns.max + call.classes, -infinity<T>);
    std::fill(columns.sum, columns.sum + call.classes, T(0));
    std::fill(columns.own, columns.own + call.classes, T(0));
    std::fill(columns.count, columns.count + call.classes, T(0));
  }
  tensors.for_tiles(begin, end, [&](int64_t first, int64_t last) {
    TileRow<T> rows[max_tile];
    int count = 0;
    for (int64_t r = first; r < last; ++r) {
      const int64_t y = label_at(call.target, call.target_type, r);
      call.loss[r] = T(0);
      call.row_states[r] = {};
      if (y == call.ignore_index) continue;
      const T* z = tensors.input.row(first, r);
      if (call.with_ce) call.loss[r] = row_loss<T, form>(call, z, y, scratch.data(), &call.row_states[r]);
      if (!call.with_columns) continue;
      columns.own[y] += z[y];
      columns.count[y] += T(1);
      rows[count++] = {z, call.row_offset == nullptr ? T(0) : call.row_offset[y]};
    }
    if (count > 0) join_columns(rows, count, call.classes, columns);
  });
}

template <class T, Affine form>
void backward(const LadeCall<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  Tensors<T> tensors(call);
  tensors.for_rows(begin, end, [&](int64_t row, const T* z, const T*, const Ahead&, T* out) {
    const int64_t y = label_at(call.target, call.target_type, row);
    if (y == call.ignore_index) {
      std::fill(out, out + call.classes, T(0));
      return;
    }
    const Adjusted<T, form> u = biased<T, form>(call, z);
    const LadeRow<T> state = call.row_states[row];
    const T upstream = call.upstream[0], offset = call.row_offset == nullptr ? T(0) : call.row_offset[y];
    const T probability = call.inverse_denominator * state.inverse_sum;
    const T z_y = z[y];  // the gradient may be written over the logits
    sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
      Vec<T> d = splat(T(0));
      if (call.with_columns)
        d = load(call.column_factor + j, T(0)) *
            exponential(load(z + j, T(0)) + (offset - load(call.column_log_sum + j, T(0))));
      if (call.with_ce) d = multiply_add<T>(splat(probability), exponential(u.minus(j, state.max, load)), d);
      store(out + j, upstream == T(1) ? d : d * upstream);
    });
    T d = call.with_ce ? call.inverse_denominator * state.at_label : T(0);
    if (call.with_columns) {
      // In the order and with the exponential of the sweep, so that a label's bits do not depend on the instruction
      // set.
      d += call.column_factor[y] * std::exp(z_y + (offset - call.column_log_sum[y])) - call.label_loss[y];
    }
    out[y] = d * upstream;
  });
}

template <class T>
void forward_any(const LadeCall<T>& call, const LadeColumns<T>& columns, int64_t begin, int64_t end) {
  if (call.bias != nullptr) return forward<T, Affine::bias>(call, columns, begin, end);
  return forward<T, Affine::uniform>(call, columns, begin, end);
}

template <class T>
void backward_any(const LadeCall<T>& call, int64_t begin, int64_t end) {
  if (call.bias != nullptr) return backward<T, Affine::bias>(call, begin, end);
  return backward<T, Affine::uniform>(call, begin, end);
}

}  // namespace

extern const LadeTable lade_table;
const LadeTable lade_table = {{forward_any<float>, backward_any<float>}, {forward_any<double>, backward_any<double>}};

}  // namespace ltk::LTK_ISA
