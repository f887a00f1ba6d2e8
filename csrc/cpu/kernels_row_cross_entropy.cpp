// The rows of losses whose adjustments depend on the row, compiled once per instruction set.
//
// What depends on the row becomes a row of scales and one of biases, in scratch memory that stays in the cache: a
// gate's 1 + g a_j and g b_j, a pair term beside b_j. From there on a row is swept as in kernels_cross_entropy.cpp,
// with its labels left out: they are terms of their own, one or two a row, each with its margin. With m and S the
// maximum of u_j and the sum of e^(u_j - m) over the other classes, label k's softmax has the sum
//   S e^(m - m_k) + e^(u_o - m_k) + e^(l_k - m_k),   m_k = max(m, u_o, l_k),
// where l_k is its adjusted logit and u_o the plain one of the other label, if that is another class.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/philox_simd.h"
#include "cpu/row_cross_entropy.h"
#include "cpu/row_tensors.h"
#include "cpu/simd.h"
#include "cpu/sweeps.h"

namespace ltk::LTK_ISA {
namespace {

template <class T>
using Call = RowCrossEntropyCall<T>;

// Scratch of a thread: the row's scales and biases, and e^(u_j - m) where no gradient is written.
template <class T>
struct Workspace {
  Scratch<T> scale, bias, spare;
  Scratch<uint32_t> words;
  explicit Workspace(const Call<T>& call)
      : scale(call.gate != nullptr ? call.classes : 0),
        bias(call.gate != nullptr || call.pair != nullptr ? call.classes : 0),
        spare(call.classes),
        words(call.pair_term == PairTerm::drop ? 4 * drop_blocks(call.classes) : 0) {}
};

// The labels of a row.
struct Labels {
  int64_t y[2];
  bool valid[2];
  bool any() const { return valid[0] || valid[1]; }
  // Whether label k's softmax has the other label as a class of its own.
  bool has_other(int k) const { return valid[1 - k] && y[0] != y[1]; }
};

template <class T>
LTK_INLINE Labels labels_of(const Call<T>& call, int64_t row) {
  Labels labels{{label_at(call.target, call.target_type, row), 0}, {true, false}};
  labels.valid[0] = labels.y[0] != call.ignore_index;
  if (call.second_target != nullptr) {
    labels.y[1] = label_at(call.second_target, call.target_type, row);
    labels.valid[1] = labels.y[1] != call.ignore_index;
  }
  if (!labels.valid[0]) labels.y[0] = labels.valid[1] ? labels.y[1] : 0;
  if (!labels.valid[1]) labels.y[1] = labels.y[0];
  return labels;
}

// The logits without what depends on the row.
template <class T, Affine form>
LTK_INLINE Adjusted<T, form> shared_view(const Call<T>& call, const T* x) {
  return {x, call.uniform_scale, call.scale, call.bias};
}

template <class T, Affine form>
LTK_INLINE Adjusted<T, form> from(Adjusted<T, form> u, int64_t begin) {
  return {u.x + begin, u.s, u.scale == nullptr ? nullptr : u.scale + begin,
          u.bias == nullptr ? nullptr : u.bias + begin};
}

template <class T, Affine form>
T log_sum_of(const Adjusted<T, form> z, int64_t classes, T* e) {
  const T m = row_maximum(z, classes);
  if (m == -infinity<T>) return m;
  return m + std::log(exponentiate(z, classes, m, static_cast<const T*>(nullptr), e, Ahead{}).exponentials);
}

// Seesaw's terms, added to the shared biases.
template <class T, Affine form>
void add_seesaw(const Call<T>& call, const Adjusted<T, form> z, int64_t y, T log_sum, T* bias) {
  const T own = call.pair[y], least = std::max(z.at(y) - log_sum, call.log_pair_eps);
  const Vec<T> zero = splat(T(0));
  sweep<T>(0, call.classes, [&](int64_t j, auto load, auto store) {
    const Vec<T> rarer = load(call.pair + j, T(0)) - own, above = z.minus(j, log_sum, load) - least;
    Vec<T> term = call.pair_p * (rarer < zero ? rarer : zero) + call.pair_q * (above > zero ? above : zero);
    if (call.bias != nullptr) term += load(call.bias + j, T(0));
    store(bias + j, term);
  });
  bias[y] = call.bias == nullptr ? T(0) : call.bias[y];
}

// The random words of a row, in the order of its classes; `words` has room for whole blocks.
template <class T>
void random_words(const Call<T>& call, int64_t row, uint32_t* words) {
  const int64_t count = drop_blocks(call.classes), first = row * count;
  int64_t block = 0;
#if defined(__AVX2__)
  constexpr int vectors = 4;
  const RoundKeys keys(call.seed);
  Words lane_numbers{}, even{}, odd{};
  for (int64_t lane = 0; lane < word_lanes; ++lane) {
    lane_numbers[lane] = uint64_t(lane);
    // Of two vectors with the words 0 and 1, and 2 and 3, of a block in each lane: the blocks one after the other.
    even[lane] = uint64_t(lane / 2 + lane % 2 * word_lanes);
    odd[lane] = even[lane] + word_lanes / 2;
  }
  for (; block + vectors * word_lanes <= count; block += vectors * word_lanes) {
    Words c0[vectors], c1[vectors], c2[vectors], c3[vectors];
    for (int k = 0; k < vectors; ++k) {
      c0[k] = lane_numbers + every(uint64_t(first + block + k * word_lanes));
      c1[k] = c0[k] >> 32;
      c2[k] = every(call.step);
      c3[k] = every(class_drops);
    }
    philox(c0, c1, c2, c3, keys);
    for (int k = 0; k < vectors; ++k) {
      const Words low = (c0[k] & every(0xffffffff)) | c1[k] << 32, high = (c2[k] & every(0xffffffff)) | c3[k] << 32;
      const Words parts[2] = {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd)};
      std::memcpy(words + 4 * (block + k * word_lanes), parts, sizeof parts);
    }
  }
#endif
  for (; block < count; ++block) {
    const PhiloxBlock random = philox(uint64_t(first + block), call.step, class_drops, call.seed);
    std::memcpy(words + 4 * block, random.words, sizeof random.words);
  }
}

template <class T>
void drop_classes(const Call<T>& call, int64_t row, int64_t y, uint32_t* words, T* bias) {
  if (call.bias == nullptr)
    for (int64_t j = 0; j < call.classes; ++j) bias[j] = T(0);
  else
    std::memcpy(bias, call.bias, call.classes * sizeof(T));
  if (call.drop_threshold == 0) return;
  const T own = bias[y];
  random_words(call, row, words);
  const uint32_t highest = uint32_t(call.drop_threshold - 1);  // the threshold may be 2^32
  int64_t j = 0;
  if constexpr (sizeof(T) == 4) {
    for (; j + lanes<T> <= call.classes; j += lanes<T>) {
      BitVec<T> word;
      std::memcpy(&word, words + j, sizeof word);
      const IntVec<T> dropped = (IntVec<T>)(word <= highest - BitVec<T>{}) & (load(call.pair + j) != splat(T(0)));
      store(bias + j, dropped ? splat(-infinity<T>) : load(bias + j));
    }
  }
  for (; j < call.classes; ++j)
    if (words[j] <= highest && call.pair[j] != T(0)) bias[j] = -infinity<T>;
  bias[y] = own;
}

// The row's adjusted logits without margins. `log_sum` is where seesaw's log-sum-exp is kept, `known` whether it is.
template <class T, Affine form>
Adjusted<T, form> row_view(const Call<T>& call, const T* x, int64_t row, int64_t y, bool known, Workspace<T>* work) {
  Adjusted<T, form> u = shared_view<T, form>(call, x);
  T* bias = work->bias.data();
  if (call.gate != nullptr) {
    const T g = call.gate[row];
    T* scale = work->scale.data();
    for (int64_t j = 0; j < call.classes; ++j) {
      scale[j] = call.uniform_scale + (call.scale == nullptr ? T(0) : g * call.scale[j]);
      bias[j] = call.bias == nullptr ? T(0) : g * call.bias[j];
    }
    u.scale = scale;
    u.bias = bias;
  } else if (call.pair_term == PairTerm::table && call.bias == nullptr) {
    u.bias = call.pair + y * call.classes;
  } else if (call.pair_term != PairTerm::none) {
    u.bias = bias;
    if (call.pair_term == PairTerm::table) {
      const T* terms = call.pair + y * call.classes;
      for (int64_t j = 0; j < call.classes; ++j) bias[j] = call.bias[j] + terms[j];
    } else if (call.pair_term == PairTerm::drop) {
      drop_classes(call, row, y, work->words.data(), bias);
    } else if constexpr (form == Affine::full) {
      const auto z = shared_view<T, Affine::full>(call, x);
      if (!known) call.log_sum[row] = log_sum_of(z, call.classes, work->spare.data());
      add_seesaw(call, z, y, call.log_sum[row], bias);
    } else if (call.bias != nullptr) {
      const auto z = shared_view<T, Affine::bias>(call, x);
      if (!known) call.log_sum[row] = log_sum_of(z, call.classes, work->spare.data());
      add_seesaw(call, z, y, call.log_sum[row], bias);
    } else {
      const auto z = shared_view<T, Affine::uniform>(call, x);
      if (!known) call.log_sum[row] = log_sum_of(z, call.classes, work->spare.data());
      add_seesaw(call, z, y, call.log_sum[row], bias);
    }
  }
  return u;
}

// Calls part(begin, end) for the stretches of columns between the labels.
template <class Part>
LTK_INLINE void between(const Labels& labels, int64_t classes, Part part) {
  const int64_t low = std::min(labels.y[0], labels.y[1]), high = std::max(labels.y[0], labels.y[1]);
  if (low > 0) part(int64_t(0), low);
  if (high > low + 1) part(low + 1, high);
  if (high + 1 < classes) part(high + 1, classes);
}

// One label's logits: its own with the margin, the plain one of the other label (-inf if that is no class of its own),
// and how the margin moves the logit with x_y.
template <class T>
struct LabelLogits {
  T own, other, max, cosine, slope;
};

template <class T, Affine form>
LabelLogits<T> label_logits(const Call<T>& call, const Adjusted<T, form> u, const Labels& labels, int k, T m) {
  const int64_t y = labels.y[k];
  LabelLogits<T> l{u.at(y), labels.has_other(k) ? u.at(labels.y[1 - k]) : -infinity<T>, T(0), u.x[y], T(1)};
  const T margin = call.margin == nullptr ? T(0) : call.margin[y * call.margin_stride];
  if (call.margin_type == MarginType::additive) {
    l.own -= call.uniform_scale * margin;
  } else {
    const ArcCosine<T> moved = arc_cosine(u.x[y], margin, call.margin_type);
    l.cosine = moved.value;
    l.slope = moved.slope;
    l.own = multiply_add_one(moved.value, u.slope(y), form == Affine::uniform ? T(0) : u.bias[y]);
  }
  l.max = std::max(std::max(m, l.other), l.own);
  return l;
}

// The sums over the classes between the labels; all 0 and max -inf if there are none.
template <class T>
struct Others {
  T max, exponentials, smooth_distance;
};

// What is subtracted from their logits: e^(-inf - 0) is 0.
template <class T>
LTK_INLINE T subtracted(T max) {
  return max == -infinity<T> ? T(0) : max;
}

template <class T, Affine form>
Others<T> sweep_others(const Call<T>& call, const Adjusted<T, form> u, const Labels& labels, const Ahead& ahead, T* e) {
  T m = -infinity<T>;
  between(labels, call.classes,
          [&](int64_t begin, int64_t end) { m = std::max(m, row_maximum(from(u, begin), end - begin)); });
  Others<T> others{m, T(0), T(0)};
  m = subtracted(m);
  between(labels, call.classes, [&](int64_t begin, int64_t end) {
    const T* ws = call.smooth == nullptr ? nullptr : call.smooth + begin;
    Ahead rest = ahead;
    if (rest.input != nullptr) {
      rest.input += begin * rest.input_bytes;
      rest.gradient += begin * rest.gradient_bytes;
    }
    const RowSums<T> sums = exponentiate(from(u, begin), end - begin, m, ws, e + begin, rest);
    others.exponentials += sums.exponentials;
    others.smooth_distance += sums.smooth_distance;
  });
  return others;
}

template <class T>
T share_of(const Call<T>& call, int64_t row, int k) {
  if (call.lam == nullptr) return T(1);
  const T lam = call.lam[row * call.lam_stride];
  return k == 0 ? lam : T(1) - lam;
}

// Loss and state of label k.
template <class T, Affine form>
T finish(const Call<T>& call, const Adjusted<T, form> u, const Labels& labels, int k, const Others<T>& others,
         int64_t row, RowState<T>* state) {
  const int64_t y = labels.y[k];
  const LabelLogits<T> l = label_logits(call, u, labels, k, others.max);
  const T eps = call.class_smoothing == nullptr ? call.options.label_smoothing : call.class_smoothing[y];
  RowOptions<T> options = call.options;
  T smooth_distance = T(0), smooth_weight = T(0);
  if (call.smooth != nullptr) {
    options = row_options(call.options, eps, call.reached, call.off_target);
    smooth_weight = call.smooth[y];
    const T other_weight = labels.has_other(k) ? call.smooth[labels.y[1 - k]] : T(0);
    const T rise = others.max == -infinity<T> ? T(0) : l.max - others.max;
    smooth_distance = others.smooth_distance + (options.smoothing_total - smooth_weight - other_weight) * rise +
                      weighted(other_weight, l.max - l.other) + weighted(smooth_weight, l.max - l.own);
  }
  const T rest = others.exponentials * std::exp(others.max - l.max) + std::exp(l.other - l.max);
  const T row_weight = (call.row_weight == nullptr ? T(1) : call.row_weight[row]) * share_of(call, row, k);
  const Influence<T> influence{call.feature_norm == nullptr ? T(0) : call.feature_norm[row], call.influence_alpha,
                               call.influence_eps};
  const T loss = finish_label_row(l.max, rest, std::exp(l.own - l.max), l.max - l.own, smooth_distance,
                                  call.weight == nullptr ? T(1) : call.weight[y], smooth_weight, row_weight, options,
                                  state, call.feature_norm == nullptr ? nullptr : &influence);
  // What has no weight moves nothing, even where its loss is infinite.
  if (row_weight == T(0) && l.max == l.max) state->probability = state->factor = state->at_label = T(0);
  state->max = others.max;  // the labels' own maxima follow from it
  state->factor *= options.smoothing_per_class;
  return loss;
}

// The gradient of a row with respect to its adjusted logits, by what it is made of: P e^(u_j - m) - F ws_j for the
// classes between the labels, and a number for each label.
template <class T>
struct RowGradient {
  T max, probability, factor;
  T at_label[2];  // dl/du at the labels' columns
  T own[2];       // the part of it that went through the margin
  T slope[2], cosine[2];
};

// Of the labels for which `of(k)` is not 0, which multiplies them.
template <class T, Affine form>
RowGradient<T> row_gradient(const Call<T>& call, const Adjusted<T, form> u, const Labels& labels, int64_t row,
                            const T (&of)[2]) {
  RowGradient<T> g{call.states[labels.valid[0] ? 0 : 1][row].max, T(0), T(0), {}, {}, {T(1), T(1)}, {}};
  for (int k = 0; k < 2; ++k) {
    if (!labels.valid[k]) continue;
    const RowState<T>& state = call.states[k][row];
    const LabelLogits<T> l = label_logits(call, u, labels, k, g.max);
    const T probability = of[k] * state.probability;
    g.probability += probability * std::exp(g.max - l.max);
    g.factor += of[k] * state.factor;
    g.own[k] = of[k] * state.at_label;
    g.at_label[k] += g.own[k];
    g.slope[k] = l.slope;
    g.cosine[k] = l.cosine;
    if (labels.has_other(k)) {
      const T smooth_weight = call.smooth == nullptr ? T(0) : call.smooth[labels.y[1 - k]];
      g.at_label[1 - k] += probability * std::exp(l.other - l.max) - of[k] * state.factor * smooth_weight;
    }
  }
  g.max = subtracted(g.max);
  return g;
}

// Calls column(y, dl/du, the part of it through the margin, slope, cosine) for each class that is a label.
template <class T, class Column>
LTK_INLINE void for_labels(const Labels& labels, const RowGradient<T>& g, Column column) {
  if (labels.valid[0] && labels.valid[1] && labels.y[0] == labels.y[1]) {  // one class, one cosine, two labels
    column(labels.y[0], g.at_label[0] + g.at_label[1], g.own[0] + g.own[1], g.slope[0], g.cosine[0]);
    return;
  }
  for (int k = 0; k < 2; ++k)
    if (labels.valid[k]) column(labels.y[k], g.at_label[k], g.own[k], g.slope[k], g.cosine[k]);
}

// sum_j dl/du_j s (a_j x_j + b_j): how the loss changes with the gate. `e` holds e^(u_j - m).
template <class T>
T gate_slope(const Call<T>& call, const Labels& labels, const RowGradient<T>& g, const T* x, const T* e) {
  const auto term = [&](int64_t j) {
    const T ax = call.scale == nullptr || x[j] == -infinity<T> ? T(0) : call.scale[j] * x[j];
    return ax + (call.bias == nullptr ? T(0) : call.bias[j]);
  };
  const Vec<T> zero = splat(T(0));
  Vec<T> sum = zero;
  between(labels, call.classes, [&](int64_t begin, int64_t end) {
    blocks(end - begin, [&](int64_t first, int64_t last) {
      Vec<T> part = zero;
      sweep<T>(begin + first, begin + last, [&](int64_t j, auto load, auto) {
        Vec<T> d = g.probability * load(e + j, T(0)), along = zero;
        if (call.smooth != nullptr) d -= g.factor * load(call.smooth + j, T(0));
        if (call.scale != nullptr) {
          const Vec<T> v = load(x + j, T(0));
          along = v == splat(-infinity<T>) ? zero : load(call.scale + j, T(0)) * v;
        }
        if (call.bias != nullptr) along += load(call.bias + j, T(0));
        part += d * along;
      });
      sum += part;
    });
  });
  T total = sum_lanes<T>(sum);
  for_labels(labels, g, [&](int64_t y, T d, T, T, T) { total += d * term(y); });
  return total;
}

// Writes the gradient of the logits; e(j, load) gives e^(u_j - m).
template <class T, Affine form, class Exponentials>
LTK_INLINE void write_gradient(const Call<T>& call, const Adjusted<T, form> u, const Labels& labels,
                               const RowGradient<T>& g, T upstream, Exponentials e, T* out) {
  gradient_row(call.classes, u, g.probability, g.factor, call.smooth, upstream, e, out);
  for_labels(labels, g, [&](int64_t y, T d, T own, T slope, T) {
    out[y] = u.slope(y) * (slope == T(1) ? d : d + own * (slope - T(1))) * upstream;
  });
}

template <class T, Affine form>
void forward(const Call<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  Tensors<T> tensors(call);
  Workspace<T> work(call);
  const bool two = call.second_target != nullptr;
  tensors.for_rows(begin, end, [&](int64_t row, const T* x, const T*, const Ahead& ahead, T* out) {
    const Labels labels = labels_of(call, row);
    for (int k = 0; k <= int(two); ++k) {
      call.losses[k][row] = T(0);
      call.states[k][row] = {};
      if (call.gate != nullptr) call.gate_slopes[k][row] = T(0);
    }
    if (!labels.any()) {
      if (call.log_sum != nullptr) call.log_sum[row] = T(0);
      if (call.gradient != nullptr) std::fill(out, out + call.classes, T(0));
      return;
    }
    const Adjusted<T, form> u = row_view<T, form>(call, x, row, labels.y[0], false, &work);
    T* e = call.gradient != nullptr ? out : work.spare.data();
    const Others<T> others = sweep_others(call, u, labels, ahead, e);
    for (int k = 0; k <= int(two); ++k)
      if (labels.valid[k]) call.losses[k][row] = finish(call, u, labels, k, others, row, &call.states[k][row]);
    for (int k = 0; k <= int(two) && call.gate != nullptr; ++k) {
      if (!labels.valid[k]) continue;
      const T one[2] = {T(k == 0), T(k == 1)};
      call.gate_slopes[k][row] = gate_slope(call, labels, row_gradient(call, u, labels, row, one), x, e);
    }
    if (call.gradient == nullptr) return;
    const RowGradient<T> g = row_gradient(call, u, labels, row, call.inverse_denominators);
    write_gradient(call, u, labels, g, T(1), [e](int64_t j, auto load) { return load(e + j, T(0)); }, out);
  });
}

template <class T, Affine form>
void backward(const Call<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  const bool sums = call.scale_sums != nullptr || call.bias_sums != nullptr;
  Tensors<T> tensors(call);
  Workspace<T> work(call);
  Scratch<T> row_scratch(sums ? call.classes : 0);
  T* dl_du = row_scratch.data();
  tensors.for_rows(begin, end, [&](int64_t row, const T* x, const T*, const Ahead&, T* out) {
    const Labels labels = labels_of(call, row);
    if (!labels.any()) {
      if (call.gradient != nullptr) std::fill(out, out + call.classes, T(0));
      return;
    }
    const T upstream = call.upstream[row * call.upstream_stride];
    const Adjusted<T, form> u = row_view<T, form>(call, x, row, labels.y[0], true, &work);
    const RowGradient<T> g = row_gradient(call, u, labels, row, call.inverse_denominators);
    const auto recomputed = [&](int64_t j, auto load) { return exponential(u.minus(j, g.max, load)); };
    if (!sums) {
      write_gradient(call, u, labels, g, upstream, recomputed, out);
      return;
    }
    // dl/du by itself: gradient_row with du/dx = 1 and upstream 1.
    gradient_row(call.classes, Adjusted<T, Affine::uniform>{x, T(1), nullptr, nullptr}, g.probability, g.factor,
                 call.smooth, T(1), recomputed, dl_du);
    for_labels(labels, g, [&](int64_t y, T d, T, T, T) { dl_du[y] = d; });
    const T factor = call.uniform_scale * upstream * (call.gate == nullptr ? T(1) : call.gate[row]);
    for (int64_t j = 0; j < call.classes; ++j) {
      const T d = factor * dl_du[j];
      if (call.bias_sums != nullptr) call.bias_sums[j] += d;
      // Whatever flows to a masked logit, it does not depend on the class's scale: -inf times anything is -inf.
      if (call.scale_sums != nullptr) call.scale_sums[j] += x[j] == -infinity<T> ? T(0) : d * x[j];
    }
    for_labels(labels, g, [&](int64_t y, T, T own, T, T cosine) {
      if (call.scale_sums != nullptr && cosine != x[y]) call.scale_sums[y] += factor * own * (cosine - x[y]);
    });
    if (call.gradient == nullptr) return;
    for (int64_t j = 0; j < call.classes; ++j) out[j] = u.slope(j) * dl_du[j] * upstream;
    for_labels(labels, g, [&](int64_t y, T d, T own, T slope, T) {
      out[y] = u.slope(y) * (slope == T(1) ? d : d + own * (slope - T(1))) * upstream;
    });
  });
}

template <class T>
void forward_any(const Call<T>& call, int64_t begin, int64_t end) {
  if (call.scale != nullptr || call.gate != nullptr) return forward<T, Affine::full>(call, begin, end);
  if (call.bias != nullptr || call.pair != nullptr) return forward<T, Affine::bias>(call, begin, end);
  return forward<T, Affine::uniform>(call, begin, end);
}

template <class T>
void backward_any(const Call<T>& call, int64_t begin, int64_t end) {
  if (call.scale != nullptr || call.gate != nullptr) return backward<T, Affine::full>(call, begin, end);
  if (call.bias != nullptr || call.pair != nullptr) return backward<T, Affine::bias>(call, begin, end);
  return backward<T, Affine::uniform>(call, begin, end);
}

}  // namespace

extern const RowCrossEntropyTable row_cross_entropy_table;
const RowCrossEntropyTable row_cross_entropy_table = {{forward_any<float>, backward_any<float>},
                                                      {forward_any<double>, backward_any<double>}};

}  // namespace ltk::LTK_ISA
