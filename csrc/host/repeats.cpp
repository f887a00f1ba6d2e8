// How often samples are repeated in an epoch: repeat factors, rounded at random by each sample's own Philox block.
#include "host/repeats.h"

#include <pybind11/numpy.h>

#include <cmath>
#include <cstdint>

#include "common/philox.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// counts[i] = floor(f) + [u < f - floor(f)] with f = factors[i] and u a multiple of 2^-53 that keys[i] decides.
py::array_t<int64_t> round_repeats(const Array<int64_t>& keys, const Array<double>& factors, uint64_t seed,
                                   uint32_t epoch) {
  if (keys.ndim() != 1 || factors.ndim() != 1 || keys.size() != factors.size())
    throw py::value_error("keys and factors: expected one-dimensional arrays of one length");
  py::array_t<int64_t> counts(keys.size());
  const int64_t* key = keys.data();
  const double* factor = factors.data();
  int64_t* count = counts.mutable_data();
  const int64_t n = keys.size();
  py::gil_scoped_release release;
  for (int64_t i = 0; i < n; ++i) {
    const double whole = std::floor(factor[i]);
    const ltk::PhiloxBlock random = ltk::philox(uint64_t(key[i]), epoch, ltk::Stream::repeats, seed);
    const uint64_t bits = (uint64_t(random.words[1]) << 32 | random.words[0]) >> 11;
    count[i] = int64_t(whole) + (double(bits) * 0x1p-53 < factor[i] - whole);
  }
  return counts;
}

}  // namespace

namespace ltk {

void bind_repeats(py::module_& m) {
  m.def("round_repeats", &round_repeats, py::arg("keys"), py::arg("factors"), py::arg("seed"), py::arg("epoch"),
        "Repeat factors rounded at random.\n\n"
        "Args:\n"
        "    keys: int64 (n,).\n"
        "    factors: float64 (n,), finite and >= 0.\n"
        "    seed: 64 bits without a sign.\n"
        "    epoch: 32 bits without a sign.\n\n"
        "Returns:\n"
        "    int64 (n,): the factor rounded down, or up with the probability of its fraction.");
}

}  // namespace ltk
