// mmkernels._C: what this build is and how kernels would be launched. No tensors pass through it; the ops do not need it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "mmkernels/layer_mix.h"

namespace py = pybind11;

namespace {

std::string cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512 (x86-64-v4)";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2 (x86-64-v3)";
  return "SSE2 (x86-64)";
#else
  return "compiler default";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = MMKERNELS_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = MMKERNELS_CUDA_STATE;
  info["python"] = PY_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, CPU features and launch plans of mmkernels.";
  m.def("build_info", &build_info, "Compiler, CUDA toolkit and Python that this build was made with.");
  m.def("cpu_capability", &cpu_capability, "The instruction set that the CPU kernels use on this machine.");
  m.def(
      "layer_mix_chunks",
      [](int64_t rows, bool need_affine) {
        const mmk::LayerMixChunks plan = mmk::layer_mix_chunks(rows, need_affine);
        return py::make_tuple(plan.rows_per_chunk, plan.chunks);
      },
      py::arg("rows"), py::arg("need_affine"), "(rows per chunk, chunks) of layer_mix's backward sums.");
}
