// Defines the kernels of one type of logits. Each type is a compilation of its own, so that they run side by side.
#pragma once

#include "cuda/cross_entropy_launch.cuh"

#define LTK_CROSS_ENTROPY_INSTANCES(E, T)                                                 \
  namespace ltk::cuda {                                                                   \
  template <>                                                                             \
  int64_t forward_partials<E, T>(const Call<T>& call, const char** error) {               \
    return forward_partials_of<E, T>(call, error);                                        \
  }                                                                                       \
  template <>                                                                             \
  const char* forward<E, T>(const Call<T>& call, void* stream) {                          \
    return forward_of<E, T>(call, stream);                                                \
  }                                                                                       \
  template <>                                                                             \
  const char* backward<E, T>(const Call<T>& call, void* stream) {                         \
    return backward_of<E, T>(call, stream);                                               \
  }                                                                                       \
  template <>                                                                             \
  int64_t column_splits<E, T>(const Call<T>& call, const char** error) {                  \
    simt::Device device;                                                                  \
    return (*error = simt::current_device(&device)) ? 0 : column_splits_of(call, device); \
  }                                                                                       \
  }
