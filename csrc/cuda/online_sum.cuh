// The sum of a softmax in one sweep.
#pragma once

#include <cmath>

#include "cuda/batch.cuh"

namespace ltk::cuda {

// Maximum and sum of e^(u - maximum), of values that come a few at a time.
template <class T>
struct OnlineSum {
  T max = -T(INFINITY), sum = T(0);

  template <int count>
  LTK_DEVICE void add(const T (&u)[count]) {
    T highest = max;
#pragma unroll
    for (int k = 0; k < count; ++k) highest = u[k] > highest ? u[k] : highest;
    rise(highest);
    const T base = reference();
#pragma unroll
    for (int k = 0; k < count; ++k) sum += simt::exp2(exponent(u[k], log2_e<T>, base));
  }
  LTK_DEVICE void join(T other_max, T other_sum) {
    rise(other_max > max ? other_max : max);
    sum += other_sum * simt::exp2(exponent(other_max, log2_e<T>, reference()));
  }
  LTK_DEVICE void rise(T highest) {
    const T before = max;
    max = highest;
    sum *= simt::exp2(exponent(before, log2_e<T>, reference()));
  }
  LTK_DEVICE T reference() const { return max == -T(INFINITY) ? T(0) : max; }  // -inf - -inf is NaN
};

}  // namespace ltk::cuda
