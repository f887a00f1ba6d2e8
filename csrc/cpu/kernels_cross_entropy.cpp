// The rows of cross_entropy, compiled once per instruction set.
//
// A row is swept while it is in L1/L2: (1) a bound m on its logits; (2) e^(u_j - m), summed, and written where the
// gradient will stand; (3) where the gradient is wanted now, one multiplication a logit. One exponential a logit. A
// backward that recomputes is one sweep: e^(u_j - m) from the row's state, and out. Logits of another type or layout
// than T at unit class stride pass through scratch rows that stay in the cache.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cpu/cross_entropy.h"
#include "cpu/row_tensors.h"
#include "cpu/simd.h"
#include "cpu/sweeps.h"

namespace ltk::LTK_ISA {
namespace {

template <class T, Affine form, class Exponentials>
LTK_INLINE void gradient_row(const CrossEntropyCall<T>& call, const Adjusted<T, form> u, const RowState<T>& state,
                             T upstream, Exponentials e, T* out) {
  gradient_row(call.classes, u, call.inverse_denominator * state.probability,
               call.inverse_denominator * state.factor * call.options.smoothing_per_class, call.smooth, upstream, e,
               out);
}

// For probabilities dl/du_j = P e_j - t_j (A (1 - eps) w_j + B) - S ws_j.
template <class T>
void probability_dl_du(const CrossEntropyCall<T>& call, const RowState<T>& state, const T* t, const T* e, T* dl_du) {
  const T f = call.inverse_denominator;
  const T hard = f * state.factor * (T(1) - call.options.label_smoothing), raw = f * state.at_label;
  const T probability = f * state.probability, smooth = f * state.factor * call.options.smoothing_per_class;
  sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
    const Vec<T> w = call.weight ? load(call.weight + j, T(0)) : splat(T(1));
    Vec<T> d = multiply_add<T>(splat(probability), load(e + j, T(0)), -load(t + j, T(0)) * (hard * w + raw));
    if (call.smooth != nullptr) d -= smooth * load(call.smooth + j, T(0));
    store(dl_du + j, d);
  });
}

// What the sweeps leave of a row with a label.
template <class T>
struct LabelRow {
  int64_t y;
  T max, others, at_label, label_distance, smooth_distance, smooth_weight;
};

// Sweeps (1) and (2), with e^(u_j - m) left in `e`.
template <class T, Affine form>
LabelRow<T> label_sweeps(const CrossEntropyCall<T>& call, const Adjusted<T, form>& u, int64_t y, const Ahead& ahead,
                         T* e) {
  const T margin = call.margin == nullptr ? T(0) : call.uniform_scale * call.margin[y * call.margin_stride];
  const T raw = u.at(y), label = raw - margin;
  T m = row_maximum(u, call.classes);
  // m has to be near the largest u, not equal to it; only a large margin on the largest logit moves it far away.
  if (margin > T(40) && raw > m - T(1)) {
    m = label;
    for (int64_t j = 0; j < call.classes; ++j)
      if (j != y) m = std::max(m, u.at(j));
  }
  m = std::max(m, label);
  const RowSums<T> sums = exponentiate(u, call.classes, m, call.smooth, e, ahead);
  // sum over j != y: by subtraction where that is exact enough, else added up again.
  const T others =
      T(2) * e[y] <= sums.exponentials && raw <= m ? sums.exponentials - e[y] : sum_without(e, call.classes, y);
  const T smooth_weight = call.smooth == nullptr ? T(0) : call.smooth[y];
  return {y,
          m,
          others,
          margin == T(0) ? e[y] : std::exp(label - m),
          m - label,
          sums.smooth_distance + weighted(smooth_weight, margin),
          smooth_weight};
}

template <class T>
T finish(const CrossEntropyCall<T>& call, const LabelRow<T>& row, int64_t index, RowState<T>* state) {
  return finish_label_row(row.max, row.others, row.at_label, row.label_distance, row.smooth_distance,
                          call.weight ? call.weight[row.y] : T(1), row.smooth_weight,
                          call.row_weight ? call.row_weight[index] : T(1), call.options, state);
}

template <class T, Affine form>
T probability_row(const CrossEntropyCall<T>& call, const Adjusted<T, form>& u, int64_t row, const T* t,
                  const Ahead& ahead, T* e, RowState<T>* state, bool* bad) {
  const T m = row_maximum(u, call.classes);
  const RowSums<T> sums = exponentiate(u, call.classes, m, call.smooth, e, ahead);
  const Vec<T> zero = splat(T(0));
  Vec<T> total = zero, distance = zero, weighted_total = zero, weighted_distance = zero;
  IntVec<T> wrong = {};
  blocks(call.classes, [&](int64_t begin, int64_t end) {
    Vec<T> part_total = zero, part_distance = zero, part_weighted_total = zero, part_weighted_distance = zero;
    sweep<T>(begin, end, [&](int64_t j, auto load, auto) {
      const Vec<T> p = load(t + j, T(0)), w = call.weight ? load(call.weight + j, T(0)) : splat(T(1));
      // What has no probability or no weight adds nothing, even where u_j = -inf.
      const Vec<T> term = p != zero ? p * -u.minus(j, m, load) : zero;
      part_total += p;
      part_distance += term;
      part_weighted_total += w * p;
      part_weighted_distance += w != zero ? w * term : zero;
      wrong |= ~((p >= zero) & (p < splat(infinity<T>)));
      if (call.bias != nullptr) wrong |= (load(call.bias + j, T(0)) == splat(-infinity<T>)) & (p != zero);
    });
    total += part_total;
    distance += part_distance;
    weighted_total += part_weighted_total;
    weighted_distance += part_weighted_distance;
  });
  for (int64_t k = 0; k < lanes<T>; ++k) *bad |= wrong[k] != 0;
  return finish_probability_row(m, sums.exponentials, sum_lanes<T>(total), sum_lanes<T>(distance),
                                sum_lanes<T>(weighted_total), sum_lanes<T>(weighted_distance), sums.smooth_distance,
                                call.row_weight ? call.row_weight[row] : T(1), call.options, state);
}

template <class T, Affine form>
Adjusted<T, form> adjusted(const CrossEntropyCall<T>& call, const T* x) {
  return {x, call.uniform_scale, call.scale, call.bias};
}

// out_j = du_j/dx_j dl_du_j upstream, the order of gradient_row.
template <class T, Affine form>
void scaled(const Adjusted<T, form>& u, int64_t classes, const T* dl_du, T upstream, T* out) {
  for (int64_t j = 0; j < classes; ++j) out[j] = u.slope(j) * dl_du[j] * upstream;
}

// --- The kernels ---

template <class T, Affine form>
bool forward(const CrossEntropyCall<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  RowState<T>* states = reinterpret_cast<RowState<T>*>(call.state);
  Tensors<T> tensors(call);
  bool bad = false;
  const auto upstream = [&](int64_t row) {
    return call.upstream == nullptr ? T(1) : call.upstream[row * call.upstream_stride];
  };
  if (tensors.probabilities) {
    const bool over = call.gradient == call.input;  // the logits are read again after the exponentials are written
    Scratch<T> scratch(over ? call.classes : 0);
    tensors.for_rows(begin, end, [&](int64_t row, const T* x, const T* t, const Ahead& ahead, T* out) {
      T* e = over ? scratch.data() : out;
      call.loss[row] = probability_row(call, adjusted<T, form>(call, x), row, t, ahead, e, &states[row], &bad);
      if (call.gradient == nullptr) return;
      probability_dl_du(call, states[row], t, e, e);
      scaled(adjusted<T, form>(call, x), call.classes, e, upstream(row), out);
    });
    return !bad;
  }
  // From a row's maximum to its gradient each step waits for the one before. A tile takes each step for all its rows,
  // and the processor works on several at a time.
  tensors.for_tiles(begin, end, [&](int64_t first, int64_t last) {
    LabelRow<T> rows[max_tile];
    for (int64_t r = first; r < last; ++r) {
      LabelRow<T>& row = rows[r - first];
      row.y = label_at(call.target, call.target_type, r);
      if (row.y != call.ignore_index)
        row = label_sweeps(call, adjusted<T, form>(call, tensors.input.row(first, r)), row.y, tensors.ahead(r, end),
                           tensors.gradient.row(first, r));
    }
    for (int64_t r = first; r < last; ++r) {
      if (rows[r - first].y != call.ignore_index) {
        call.loss[r] = finish(call, rows[r - first], r, &states[r]);
      } else {
        call.loss[r] = T(0);
        states[r] = {};
      }
    }
    if (call.gradient == nullptr) return;
    for (int64_t r = first; r < last; ++r) {
      T* e = tensors.gradient.row(first, r);
      const int64_t y = rows[r - first].y;
      if (y == call.ignore_index) {
        std::fill(e, e + call.classes, T(0));
        continue;
      }
      const Adjusted<T, form> u = adjusted<T, form>(call, tensors.input.row(first, r));
      const T g = upstream(r);
      gradient_row(call, u, states[r], g, [e](int64_t j, auto load) { return load(e + j, T(0)); }, e);
      e[y] = u.slope(y) * (call.inverse_denominator * states[r].at_label) * g;
    }
  });
  return !bad;
}

template <class T, Affine form>
void backward(const CrossEntropyCall<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  const RowState<T>* states = reinterpret_cast<const RowState<T>*>(call.state);
  const bool sums = call.scale_sums != nullptr || call.bias_sums != nullptr;
  Tensors<T> tensors(call);
  Scratch<T> row_scratch(sums || tensors.probabilities ? call.classes : 0);
  T* dl_du = row_scratch.data();
  tensors.for_rows(begin, end, [&](int64_t row, const T* x, const T* t, const Ahead& ahead, T* out) {
    const Adjusted<T, form> u = adjusted<T, form>(call, x);
    const RowState<T>& state = states[row];
    const T upstream = call.upstream[row * call.upstream_stride];
    const int64_t y = t != nullptr ? -1 : label_at(call.target, call.target_type, row);
    if (t == nullptr && y == call.ignore_index) {
      std::fill(out, out + call.classes, T(0));
      return;
    }
    const auto recomputed = [&](int64_t j, auto load) { return exponential(u.minus(j, state.max, load)); };
    if (t == nullptr && !sums) {
      if (ahead.input == nullptr)
        gradient_row(call, u, state, upstream, recomputed, out);
      else
        gradient_row(
            call, u, state, upstream,
            [&](int64_t j, auto load) {
              ahead.column(j);
              return recomputed(j, load);
            },
            out);
      out[y] = u.slope(y) * (call.inverse_denominator * state.at_label) * upstream;
      return;
    }
    // dl/du by itself: gradient_row with du/dx = 1 and upstream 1.
    if (t != nullptr) {
      sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) { store(dl_du + j, recomputed(j, load)); });
      probability_dl_du(call, state, t, dl_du, dl_du);
    } else {
      gradient_row(call, Adjusted<T, Affine::uniform>{x, T(1), nullptr, nullptr}, state, T(1), recomputed, dl_du);
      dl_du[y] = call.inverse_denominator * state.at_label;
    }
    if (sums) {
      const T factor = call.uniform_scale * upstream;
      for (int64_t j = 0; j < call.classes; ++j) {
        const T d = factor * dl_du[j];
        if (call.bias_sums != nullptr) call.bias_sums[j] += d;
        // Whatever flows to a masked logit, it does not depend on the class's scale: -inf times anything is -inf.
        if (call.scale_sums != nullptr) call.scale_sums[j] += x[j] == -infinity<T> ? T(0) : d * x[j];
      }
    }
    scaled(u, call.classes, dl_du, upstream, out);
  });
}

template <class T>
bool forward_any(const CrossEntropyCall<T>& call, int64_t begin, int64_t end) {
  if (call.scale != nullptr) return forward<T, Affine::full>(call, begin, end);
  if (call.bias != nullptr) return forward<T, Affine::bias>(call, begin, end);
  return forward<T, Affine::uniform>(call, begin, end);
}

template <class T>
void backward_any(const CrossEntropyCall<T>& call, int64_t begin, int64_t end) {
  if (call.scale != nullptr) return backward<T, Affine::full>(call, begin, end);
  if (call.bias != nullptr) return backward<T, Affine::bias>(call, begin, end);
  return backward<T, Affine::uniform>(call, begin, end);
}

}  // namespace

extern const CrossEntropyTable cross_entropy_table;
const CrossEntropyTable cross_entropy_table = {{forward_any<float>, backward_any<float>},
                                               {forward_any<double>, backward_any<double>}};

}  // namespace ltk::LTK_ISA
