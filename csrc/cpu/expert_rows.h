// The logits of several experts, a few samples at a time. Included by the kernels_*.cpp files only.
#pragma once

#include <algorithm>

#include "cpu/row_memory.h"
#include "cpu/sweeps.h"

namespace ltk::LTK_ISA {
namespace {

// Samples that pass together: short ones until their logits fill L1; where classes are strided, so many that
// neighbouring samples share cache lines.
inline int64_t samples_a_tile(int64_t experts, int64_t classes, bool strided) {
  return strided ? max_tile : std::clamp<int64_t>(short_tile / (experts * classes), 1, max_tile);
}

// The mean over the experts of a sample's logits, written to `mean`; `each(j, v, load)` sees every vector of it.
template <class T, class Each>
LTK_INLINE void mean_of_experts(const T* const* z, int64_t experts, int64_t classes, T* mean, Each each) {
  const Vec<T> share = splat(T(1) / T(experts));
  sweep<T>(0, classes, [&](int64_t j, auto load, auto store) {
    Vec<T> total = load(z[0] + j, T(0));
    for (int64_t e = 1; e < experts; ++e) total += load(z[e] + j, T(0));
    total *= share;
    store(mean + j, total);
    each(j, total, load);
  });
}

}  // namespace
}  // namespace ltk::LTK_ISA
