// The pybind11 module ltkernels._host: work on the host over NumPy arrays, without torch. Its first content tells how
// it was built.

#include <pybind11/pybind11.h>

#include <string>

#include "host/repeats.h"
#include "host/sampling_bindings.h"

namespace py = pybind11;

namespace {

std::string compiler_name() {
#if defined(__clang__)
  return "clang";
#elif defined(__GNUC__)
  return "gcc";
#else
  return "unknown";
#endif
}

std::string compiler_version() {
#if defined(__clang__)
  return __clang_version__;
#else
  return __VERSION__;
#endif
}

// What the running CPU offers, fastest first, in the names that the operator library is compiled for. The conditions
// are those of the compiler flags in setup.py: a set counts only when every extension that its code may use is there.
py::list instruction_sets() {
  py::list names;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (avx512) names.append("avx512");
  if (avx2) names.append("avx2");
#endif
  names.append("portable");
  return names;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler_name();
  info["compiler_version"] = compiler_version();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["cxx_flags"] = LTK_CXX_FLAGS;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  info["instruction_sets"] = instruction_sets();
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side routines of ltkernels over NumPy arrays; needs no torch.";
  m.def(
      "build_info", &build_info,
      "How this module was compiled and what the running CPU offers.\n\n"
      "Returns:\n"
      "    dict: compiler, compiler_version, cxx_standard (value of __cplusplus), cxx_flags, pybind11 (version), and\n"
      "    instruction_sets (list of str, fastest first, of \"avx512\", \"avx2\", \"portable\").");
  ltk::bind_sampling(m);
  ltk::bind_repeats(m);
}
