#include "host/sampling_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/class_draws.h"
#include "host/class_index.h"

namespace py = pybind11;

namespace ltk {
namespace {

[[noreturn]] void refuse(const std::string& argument, const std::string& expected) {
  throw std::invalid_argument(argument + ": expected " + expected);
}

Integers integers(const std::string& name, const py::array& array) {
  const char kind = array.dtype().kind();
  if (array.ndim() != 1 || (kind != 'i' && kind != 'u')) refuse(name, "integers of one dimension");
  constexpr char other_order = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '>' : '<';
  return {static_cast<const char*>(array.data()),  array.shape(0), array.strides(0), int(array.itemsize()), kind == 'i',
          array.dtype().byteorder() == other_order};
}

// The memory of an array to read or to write, without a copy.
template <class T, class Array>
auto* contiguous(const std::string& name, Array& array, int64_t least = 0) {
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) || array.size() < least)
    refuse(name, "another type, layout or size");
  if constexpr (std::is_const_v<Array>)
    return static_cast<const T*>(array.data());
  else
    return static_cast<T*>(array.mutable_data());
}

// Arrays as the functions in class_index.h take them. The caller keeps the arrays.
class Samples {
 public:
  Samples(const py::array& labels, const std::optional<py::array>& indices) : labels_(integers("labels", labels)) {
    if (indices) indices_ = integers("indices", *indices);
    if (labels_.size == 0 && size() > 0) refuse("indices", "none of no labels");
  }
  LabelledSamples get() const { return {labels_, indices_ ? &*indices_ : nullptr}; }
  int64_t size() const { return indices_ ? indices_->size : labels_.size; }

 private:
  Integers labels_;
  std::optional<Integers> indices_;
};

std::pair<int64_t, int64_t> scan_array(const py::array& values, const std::optional<py::array>& indices, int64_t limit,
                                       int threads) {
  const Samples samples(values, indices);
  py::gil_scoped_release release;
  const Scan found = scan(samples.get(), limit, threads);
  return {found.wrong, found.largest};
}

int64_t sort_arrays(const py::array& labels, const std::optional<py::array>& indices, py::array offsets,
                    py::array members, int threads) {
  const Samples samples(labels, indices);
  int64_t* const starts = contiguous<int64_t>("offsets", offsets, 2);
  const int64_t classes = offsets.size() - 1;
  int64_t wrong = -1;
  const auto sort = [&](auto* out) {
    py::gil_scoped_release release;
    return sort_by_class(samples.get(), classes, starts, out, threads, &wrong);
  };
  const Sorted result = members.itemsize() == 4 ? sort(contiguous<int32_t>("members", members, samples.size()))
                                                : sort(contiguous<int64_t>("members", members, samples.size()));
  if (result == Sorted::changed_meanwhile) throw std::runtime_error("labels: they changed while they were sorted");
  return wrong;
}

py::array_t<int64_t> alias_table(const py::array& masses) {
  const int64_t* const in = contiguous<int64_t>("masses", masses, 1);
  const int64_t classes = masses.size();
  py::array_t<int64_t> entries(classes);
  int64_t* const out = entries.mutable_data();
  py::gil_scoped_release release;
  uint64_t total = 0;
  for (int64_t c = 0; c < classes; ++c) total += uint64_t(in[c]);
  if (*std::min_element(in, in + classes) < 0 || total != uint64_t(classes) << 32) refuse("masses", "sum C 2^32");
  alias_entries(in, classes, out);
  return entries;
}

py::array_t<int32_t> slots(const py::array& quotas) {
  const int64_t* const in = contiguous<int64_t>("quotas", quotas, 1);
  int64_t groups = 0;
  for (int64_t c = 0; c < quotas.size(); ++c) {
    if (in[c] < 0 || in[c] >= int64_t(1) << 31) refuse("quotas", "numbers from 0 to 2^31 - 1");
    groups += in[c];
  }
  if (groups >= int64_t(1) << 31) refuse("quotas", "a sum below 2^31");
  py::array_t<int32_t> filled({groups, int64_t(4)});
  Slot* const out = reinterpret_cast<Slot*>(filled.mutable_data());
  const int64_t classes = quotas.size();
  py::gil_scoped_release release;
  fill_slots(in, classes, groups, out);
  return filled;
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.def("scan", &scan_array, py::arg("values"), py::arg("indices"), py::arg("limit"), py::arg("threads"),
        "Looks at values, or at values[indices]: integers of any type, stride and byte order.\n\n"
        "Returns:\n"
        "    tuple: the first position whose value is not in [0, limit), or -1, and, if none is, the largest value.");
  m.def("sort_by_class", &sort_arrays, py::arg("labels"), py::arg("indices"), py::arg("offsets"), py::arg("members"),
        py::arg("threads"),
        "Sorts positions, or `indices`, by their labels into members (int32 or int64), and fills offsets (C + 1,).\n\n"
        "Returns:\n"
        "    int: the first member whose label is not in [0, C), or -1.");
  m.def(
      "alias_entries", &alias_table, py::arg("masses"),
      "The columns of an alias table (threshold in the low, alias in the high 32 bits) of int64 masses (C,) with sum\n"
      "C * 2^32.");
  m.def("slots", &slots, py::arg("quotas"),
        "The slots of a round in which class c has quotas[c] (int64): window start, window size, class, ordinal.");
}

}  // namespace ltk
