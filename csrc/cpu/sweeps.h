// Sweeps over a row in cache, compiled once per instruction set: what the kernels of several hot paths do with a row.
// Included by the kernels_*.cpp files only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/row_memory.h"
#include "cpu/simd.h"

namespace ltk::LTK_ISA {
namespace {

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

// Calls chunk(j, load, store) for every vector of columns [begin, end); load(p, fill) reads the vector at p, and the
// last one, if it is short, filled up.
template <class T, class Chunk>
static inline void sweep(int64_t begin, int64_t end, Chunk chunk) {
  int64_t j = begin;
  for (; j + lanes<T> <= end; j += lanes<T>)
    chunk(j, [](const T* p, T) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  if (const int64_t rest = end - j; rest > 0)
    chunk(
        j, [rest](const T* p, T fill) { return load_first(p, rest, fill); },
        [rest](T* p, Vec<T> v) { store_first(p, v, rest); });
}

// Calls block(begin, end) for stretches of columns. Sums add up within a block first, so that their rounding grows with
// the number of blocks and not with that of classes.
template <class Block>
static inline void blocks(int64_t end, Block block) {
  constexpr int64_t size = 1024;
  for (int64_t begin = 0; begin < end; begin += size) block(begin, std::min(begin + size, end));
}

// The adjusted logits of a row without the label's margin: u_j = scale_j x_j + bias_j. The forms differ in what a logit
// costs.
enum class Affine { uniform, bias, full };

// Passed by value: behind a reference the compiler would read the fields again after every store.
template <class T, Affine form>
struct Adjusted {
  const T* x;
  T s;
  const T* scale;
  const T* bias;

  // u_j - shift; columns past the row's end come out as -inf. Without a bias the product is not rounded before the
  // subtraction.
  template <class Load>
  Vec<T> minus(int64_t j, T shift, Load load) const {
    const Vec<T> v = load(x + j, -infinity<T>);
    if constexpr (form == Affine::uniform) return multiply_add<T>(v, splat(s), splat(-shift));
    if constexpr (form == Affine::bias) return multiply_add<T>(v, splat(s), load(bias + j, T(0))) - shift;
    if constexpr (form == Affine::full) return multiply_add<T>(v, load(scale + j, T(1)), load(bias + j, T(0))) - shift;
  }
  T at(int64_t j) const {
    if constexpr (form == Affine::uniform) return x[j] * s;
    return multiply_add_one(x[j], slope(j), bias[j]);
  }
  T slope(int64_t j) const { return form == Affine::full ? scale[j] : s; }
};

template <class T, Affine form>
LTK_INLINE T row_maximum(const Adjusted<T, form> u, int64_t classes) {
  // Four chains, or the loop waits for the latency of the maximum.
  constexpr int chains = 4;
  Vec<T> best[chains];
  for (int k = 0; k < chains; ++k) best[k] = splat(-infinity<T>);
  int64_t j = 0;
  for (; j + chains * lanes<T> <= classes; j += chains * lanes<T>)
    for (int k = 0; k < chains; ++k)
      best[k] = maximum<T>(best[k], u.minus(j + k * lanes<T>, T(0), [](const T* p, T) { return load(p); }));
  sweep<T>(j, classes, [&](int64_t i, auto load, auto) { best[0] = maximum<T>(best[0], u.minus(i, T(0), load)); });
  return max_lanes<T>(maximum<T>(maximum<T>(best[0], best[1]), maximum<T>(best[2], best[3])));
}

// Sweep (2): writes e^(u_j - m) to `e`; returns its sum and sum_j ws_j (m - u_j).
template <class T>
struct RowSums {
  T exponentials, smooth_distance;
};

template <class T, Affine form, class Fetch>
LTK_INLINE RowSums<T> exponentiate(const Adjusted<T, form> u, int64_t classes, T m, const T* ws, T* e, Fetch fetch) {
  const Vec<T> zero = splat(T(0));
  Vec<T> total = zero, distance = zero;
  blocks(classes, [&](int64_t begin, int64_t end) {
    Vec<T> block_total = zero, block_distance = zero;
    if (ws == nullptr) {
      sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
        fetch(j);
        const Vec<T> ex = exponential(u.minus(j, m, load));
        store(e + j, ex);
        block_total += ex;
      });
    } else {
      sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
        fetch(j);
        const Vec<T> v = u.minus(j, m, load), ex = exponential(v), w = load(ws + j, T(0));
        store(e + j, ex);
        block_total += ex;
        block_distance -= w != zero ? w * v : zero;  // a class without weight adds nothing, even masked (v = -inf)
      });
    }
    total += block_total;
    distance += block_distance;
  });
  return {sum_lanes<T>(total), sum_lanes<T>(distance)};
}

// Not inlined: for a long row the call is nothing, and its loop keeps all registers to itself.
template <class T, Affine form>
__attribute__((noinline)) RowSums<T> exponentiate_and_fetch(const Adjusted<T, form> u, int64_t classes, T m,
                                                            const T* ws, T* e, const Ahead& ahead) {
  return exponentiate(u, classes, m, ws, e, [ahead](int64_t j) { ahead.column(j); });
}

template <class T, Affine form>
LTK_INLINE RowSums<T> exponentiate(const Adjusted<T, form> u, int64_t classes, T m, const T* ws, T* e,
                                   const Ahead& ahead) {
  if (ahead.input != nullptr) return exponentiate_and_fetch(u, classes, m, ws, e, ahead);
  return exponentiate(u, classes, m, ws, e, [](int64_t) {});
}

template <class T>
T sum_without(const T* e, int64_t classes, int64_t skip) {
  Vec<T> total = splat(T(0));
  blocks(classes, [&](int64_t begin, int64_t end) {
    Vec<T> block_total = splat(T(0));
    const auto add = [&](int64_t j, auto load, auto) { block_total += load(e + j, T(0)); };
    const int64_t hole = std::clamp(skip, begin, end);
    sweep<T>(begin, hole, add);
    sweep<T>(std::max(begin, skip + 1), end, add);
    total += block_total;
  });
  return sum_lanes<T>(total);
}

// The last sweep: the gradient du_j/dx_j (P e_j - S ws_j) times the upstream value, which is multiplied last so that a
// gradient kept from the forward (upstream 1) and multiplied later has the same bits. e(j, load) gives e^(u_j - m).
template <class T, Affine form, class Exponentials>
void gradient_row(int64_t classes, const Adjusted<T, form> u, T p, T s, const T* ws, T upstream, Exponentials e,
                  T* out) {
  const T slope = form == Affine::full ? T(1) : u.s;  // one slope for all columns goes into the row's factors
  const T probability = slope * p, smooth = slope * s;
  const auto finish = [&](auto dl_du, auto times_upstream) {
    sweep<T>(0, classes, [&](int64_t j, auto load, auto store) {
      if constexpr (form == Affine::full)
        store(out + j, times_upstream(load(u.scale + j, T(0)) * dl_du(j, load)));
      else
        store(out + j, times_upstream(dl_du(j, load)));
    });
  };
  const auto with_upstream = [&](auto dl_du) {
    if (upstream == T(1))
      finish(dl_du, [](Vec<T> v) { return v; });
    else
      finish(dl_du, [upstream](Vec<T> v) { return v * upstream; });
  };
  if (ws == nullptr)
    with_upstream([&](int64_t j, auto load) { return probability * e(j, load); });
  else
    with_upstream([&](int64_t j, auto load) {
      return multiply_add<T>(splat(probability), e(j, load), -smooth * load(ws + j, T(0)));
    });
}

// Flushes results below the smallest normal number to zero while it lives: e^(u - m) reaches them in any confident row,
// and arithmetic with subnormal numbers is many times slower.
class FlushSubnormal {
 public:
#if defined(__SSE2__)
  FlushSubnormal() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormal() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormal() {}
#endif
};

}  // namespace
}  // namespace ltk::LTK_ISA
