// mmkernels._C: build facts, CPU features and launch plans. The ops work without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "mmkernels/layer_mix.h"
#include "mmkernels/layer_project.h"

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

// Values of mmk::DType by the names that torch prints.
mmk::DType dtype_of(const std::string& name) {
  if (name == "float32") return mmk::DType::kFloat32;
  if (name == "float16") return mmk::DType::kFloat16;
  if (name == "bfloat16") return mmk::DType::kBFloat16;
  throw py::value_error("dtype: expected float32, float16 or bfloat16, got " + name);
}

py::dict layer_mix_sums(const std::string& dtype, int64_t rows, int64_t width, int32_t layers) {
  const mmk::cuda::LayerMixSums plan = mmk::cuda::layer_mix_sums(dtype_of(dtype), rows, width, layers);
  py::dict result;
  result["rows_per_chunk"] = plan.rows_per_chunk;
  result["chunks"] = plan.chunks;
  result["slice_columns"] = plan.slice_columns;
  result["slices"] = plan.slices;
  result["groups"] = plan.groups;
  result["blocks"] = plan.blocks();
  return result;
}

py::dict layer_project_tiles(int64_t rows, int64_t taps, int64_t outputs) {
  const mmk::cuda::LayerProjectTiles tiles = mmk::cuda::layer_project_tiles({rows, taps, 0, outputs});
  py::dict result;
  result["tile_rows"] = tiles.tile_rows;
  result["tile_outputs"] = tiles.tile_outputs;
  result["row_tiles"] = tiles.row_tiles;
  result["output_tiles"] = tiles.output_tiles;
  result["blocks"] = tiles.blocks();
  return result;
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
      py::arg("rows"), py::arg("need_affine"),
      "(rows per chunk, chunks) of layer_mix's backward sums on the CPU.");
  m.def("layer_mix_sums", &layer_mix_sums, py::arg("dtype"), py::arg("rows"), py::arg("width"),
        py::arg("layers"), "How layer_mix's backward sums are cut up on CUDA.");
  m.def("layer_project_tiles", &layer_project_tiles, py::arg("rows"), py::arg("taps"), py::arg("outputs"),
        "How layer_project's fused product is cut up on CUDA.");
}
