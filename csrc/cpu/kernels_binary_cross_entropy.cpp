// The rows of binary_cross_entropy, compiled once per instruction set.
//
// A row is swept once: a term needs nothing of its neighbours, so loss, gradient and sums come from one exponential,
// one logarithm and one division a logit. With labels the whole row is swept as negatives, the label's with coefficient
// 0, and the one positive is put in afterwards. A backward is the same sweep, without the loss.
#include <algorithm>
#include <cmath>

#include "cpu/binary_cross_entropy.h"
#include "cpu/row_memory.h"
#include "cpu/sigmoid_terms.h"
#include "cpu/simd.h"
#include "cpu/sweeps.h"

#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header makes its undefined vectors so
#endif

namespace ltk::LTK_ISA {
namespace {

template <class T>
using BinaryCall = BinaryCrossEntropyCall<T>;

// What all columns of a row share.
template <class T>
struct BinaryRow {
  int64_t y;            // its positive column, or -1; the target for floating targets is `t`
  const T* t;           // or null
  T factor;             // sample weight times weight
  const T* keep;        // or null
  const T* draws;       // one a column, or null
  T draw;               // of the row, without `draws`
  T inverse, upstream;  // of the gradient
};

// Draws for the blocks of four columns that have one to be drawn.
template <class T>
void fill_draws(const BinaryCall<T>& call, const T* keep, int64_t row, T* draws) {
  const int64_t blocks_a_row = draw_blocks(call.classes);
  for (int64_t block = 0; block < blocks_a_row; ++block) {
    const int64_t begin = 4 * block, count = std::min<int64_t>(4, call.classes - begin);
    bool drawn = false;
    for (int64_t k = 0; k < count; ++k) drawn |= keep[begin + k] > T(0) && keep[begin + k] < T(1);
    const PhiloxBlock random =
        drawn ? philox(uint64_t(row * blocks_a_row + block), call.step, negative_drops, call.seed) : PhiloxBlock{};
    for (int64_t k = 0; k < count; ++k) draws[begin + k] = T(draw_of(random.words[k]));
  }
}

template <class T, class Load>
LTK_INLINE Vec<T> kept(const BinaryCall<T>& call, const BinaryRow<T>& row, int64_t j, Vec<T> z, Vec<T> coefficient,
                       Load load) {
  const Vec<T> draw = row.draws != nullptr ? load(row.draws + j, T(0)) : splat(row.draw);
  auto stays = draw < load(row.keep + j, T(1));
  if (call.options.scored) stays |= z >= splat(call.options.score_logit);
  return stays ? coefficient : splat(T(0));
}

// Sweeps a row; returns its loss. `out` may be the row's logits. What is wanted is known to the compiler.
template <class T, bool with_gradient, bool with_sums>
LTK_INLINE T sweep_row(const BinaryCall<T>& call, const BinaryRow<T>& row, const T* x, T* out, const Power<T>& pos,
                       const Power<T>& neg, bool* bad) {
  const auto& o = call.options;
  const Vec<T> zero = splat(T(0));
  const T at_label = row.y >= 0 ? x[row.y] : T(0);
  const T of_negative = row.factor * o.alpha_neg, of_positive = row.factor * o.alpha_pos;
  IntVec<T> columns;
  for (int64_t k = 0; k < lanes<T>; ++k) columns[k] = k;
  Vec<T> total = zero;
  IntVec<T> wrong = {};
  blocks(call.classes, [&](int64_t begin, int64_t end) {
    Vec<T> block_total = zero;
    sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
      const Vec<T> z = load(x + j, -infinity<T>);
      Vec<T> c = splat(of_negative);
      if (call.neg_weight != nullptr) c *= load(call.neg_weight + j, T(0));
      if (row.keep != nullptr) c = kept(call, row, j, z, c, load);
      Vec<T> c_pos = zero;
      if (row.t != nullptr) {
        const Vec<T> t = load(row.t + j, T(0));
        wrong |= ~((t >= zero) & (t <= splat(T(1))));
        c *= T(1) - t;
        c_pos = of_positive * t;
        if (call.pos_weight != nullptr) c_pos *= load(call.pos_weight + j, T(0));
      } else {
        using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
        const int64_t label = row.y - j >= 0 && row.y - j < lanes<T> ? row.y - j : -1;
        c = columns == Integer(label) - IntVec<T>{} ? zero : c;
      }
      const Terms<T> negative = negative_terms<T>(z, neg, o.clip);
      block_total += masked<T>(c, negative.loss);
      Vec<T> d = c * negative.slope;
      if constexpr (with_sums) store(call.sums + call.classes + j, load(call.sums + call.classes + j, T(0)) + d);
      if (row.t != nullptr) {
        const Terms<T> positive = negative_terms<T>(-z, pos, T(0));
        block_total += masked<T>(c_pos, positive.loss);
        const Vec<T> d_pos = c_pos * positive.slope;
        if constexpr (with_sums) store(call.sums + j, load(call.sums + j, T(0)) + d_pos);
        d -= d_pos;
      }
      if constexpr (with_gradient) store(out + j, d * row.inverse * row.upstream);
    });
    total += block_total;
  });
  T loss = sum_lanes<T>(total);
  if (row.y >= 0) {
    const T c = of_positive * (call.pos_weight != nullptr ? call.pos_weight[row.y] : T(1));
    const BinaryTerm<T> term = negative_term<T>(-at_label, o.gamma_pos, T(0));
    loss += masked_term(c, term.loss);
    const T d = c * term.slope;
    if constexpr (with_sums) call.sums[row.y] += d;
    if constexpr (with_gradient) out[row.y] = -d * row.inverse * row.upstream;
  }
  for (int64_t k = 0; k < lanes<T>; ++k) *bad |= wrong[k] != 0;
  return loss;
}

template <class T>
bool has_positive(const T* t, int64_t classes) {
  for (int64_t j = 0; j < classes; ++j)
    if (t[j] > T(0)) return true;
  return false;
}

template <class T, bool with_gradient, bool with_sums>
bool run_rows(const BinaryCall<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  const bool multi_hot = is_floating(call.target_type), keeps = call.keep[0] != nullptr || call.keep[1] != nullptr;
  const bool strided = call.input_layout.stride_class != 1 ||
                       (with_gradient && call.gradient_layout.stride_class != 1) ||
                       (multi_hot && call.target_layout.stride_class != 1);
  const int64_t tile = strided ? max_tile : std::clamp<int64_t>(short_tile / call.classes, 1, max_tile);
  Rows<T> input(call.input, call.input_type, call.input_layout, call.classes, tile);
  Rows<T> gradient(call.gradient, call.gradient_type, call.gradient_layout, with_gradient ? call.classes : 0, tile);
  Rows<T> targets(multi_hot ? call.target : nullptr, call.target_type, call.target_layout, multi_hot ? call.classes : 0,
                  tile);
  Scratch<T> draws((call.drawn[0] || call.drawn[1]) && !call.options.row_draws ? call.classes : 0);
  const Power<T> pos(call.options.gamma_pos), neg(call.options.gamma_neg);
  bool bad = false;
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = std::min(first + tile, end);
    input.read(first, last);
    targets.read(first, last);
    for (int64_t r = first; r < last; ++r) {
      T* out = with_gradient ? gradient.row(first, r) : nullptr;
      BinaryRow<T> row{};
      row.t = multi_hot ? targets.row(first, r) : nullptr;
      row.y = multi_hot ? -1 : label_at(call.target, call.target_type, r);
      if (!multi_hot && row.y == call.ignore_index) {
        if (call.loss != nullptr) call.loss[r] = T(0);
        if (with_gradient) std::fill(out, out + call.classes, T(0));
        continue;
      }
      bool background = !multi_hot && call.background_index >= 0 && row.y == call.background_index;
      if (multi_hot && keeps) background = !has_positive(row.t, call.classes);
      if (!multi_hot && row.y >= call.classes) row.y = -1;  // background without a column
      row.factor = call.row_weight != nullptr ? call.row_weight[r] : T(1);
      if (call.weight != nullptr && row.y >= 0) row.factor *= call.weight[row.y];
      row.keep = call.keep[background];
      if (call.drawn[background]) {
        if (call.options.row_draws) {
          row.draw = T(row_draw(r, call.step, call.seed));
        } else {
          fill_draws(call, row.keep, r, draws.data());
          row.draws = draws.data();
        }
      }
      row.inverse = call.inverse_denominator;
      row.upstream = call.upstream != nullptr ? call.upstream[r * call.upstream_stride] : T(1);
      const T loss = sweep_row<T, with_gradient, with_sums>(call, row, input.row(first, r), out, pos, neg, &bad);
      if (call.loss != nullptr) call.loss[r] = loss;
    }
    if (with_gradient) gradient.write(first, last);
  }
  return !bad;
}

template <class T>
bool run(const BinaryCall<T>& call, int64_t begin, int64_t end) {
  if (call.gradient != nullptr)
    return call.sums != nullptr ? run_rows<T, true, true>(call, begin, end)
                                : run_rows<T, true, false>(call, begin, end);
  return call.sums != nullptr ? run_rows<T, false, true>(call, begin, end)
                              : run_rows<T, false, false>(call, begin, end);
}

}  // namespace

extern const BinaryCrossEntropyTable binary_cross_entropy_table;
const BinaryCrossEntropyTable binary_cross_entropy_table = {{run<float>}, {run<double>}};

}  // namespace ltk::LTK_ISA
