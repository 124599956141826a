// The Python module attnext._C: what the extension is and which instructions it uses. Tensors go through
// torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/version.h>

#include "cpu/instruction_set.h"
#include "cpu/scratch.h"

#if defined(ATTNEXT_WITH_CUDA)
namespace attnext::cuda {
std::pair<int, int> driver_and_runtime();  // additive.cu
}
#endif

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"torch", TORCH_VERSION},
#if defined(__clang__)
      {"compiler", std::string("clang ") + __clang_version__},
#elif defined(__GNUC__)
      {"compiler", std::string("gcc ") + __VERSION__},
#endif
#if defined(_OPENMP)
      {"openmp", std::to_string(_OPENMP)},
#endif
#if defined(ATTNEXT_WITH_CUDA)
      {"cuda", ATTNEXT_WITH_CUDA},
#endif
  };
}

// Whether one of `count` numbers, `stride` from each other, is NaN. Shared among threads as products of a batch are: a
// number that another core has just written is slow to come.
template <class T>
bool any_nan(const T* data, int64_t count, int64_t stride) {
  std::atomic<bool> found = false;
  torch::stable::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
    bool here = false;
    for (int64_t k = begin; k < end; ++k) here |= data[k * stride] != data[k * stride];
    if (here) found = true;
  });
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "attnext's C++ kernels: build information and settings";
  m.def("build_info", &build_info, "Compiler and torch version of the build; the CUDA kernels: toolkit and GPUs.");
#if defined(ATTNEXT_WITH_CUDA)
  m.def("cuda_versions", &attnext::cuda::driver_and_runtime,
        "The CUDA version that the driver is for, 0 without one, and that of the runtime inside: 13000 is 13.0.");
#endif
  m.def(
      "instruction_set", [] { return std::string(attnext::cpu::instruction_set().name); },
      "The instruction set whose kernels run.");
  m.def("instruction_sets", &attnext::cpu::instruction_sets, "Those that this machine can run, best first.");
  m.def("set_instruction_set", &attnext::cpu::set_instruction_set, pybind11::arg("name"),
        "Chooses the kernels of one instruction set; ValueError for one that this machine lacks.");
  m.def("multiply_adds", &attnext::cpu::multiply_adds, pybind11::arg("rounds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Does nothing but float32 multiply-adds, on the calling thread, and returns how many: for the machine's peak.");
  m.def(
      "any_nan",
      [](uintptr_t data, int64_t count, int64_t stride, bool wide) {
        return wide ? any_nan(reinterpret_cast<const double*>(data), count, stride)
                    : any_nan(reinterpret_cast<const float*>(data), count, stride);
      },
      "Whether one of `count` float32 numbers at an address (float64: `wide`), `stride` from each other, is NaN.");
  m.def("set_poison", &attnext::cpu::set_poison, pybind11::arg("on"),
        "Whether new and scratch memory is filled with NaN; for tests.");
}
