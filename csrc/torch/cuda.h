// What the glue of the CUDA kernels needs beside glue.h: the current stream, the device guard, the check of a
// launch, and where the kernels are registered. For the host SIMT runtime (MMK_SIMT, tests/simt/README.md)
// "device" memory is the CPU's, and the ops are in a namespace of their own, beside those of the CPU kernels.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "mmkernels/stream.h"
#include "torch/glue.h"

#ifdef MMK_SIMT
#define MMK_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(mmkernels_simt, CPU, m)
#else
#define MMK_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m)
#endif

// Declared by torch only where it is built for CUDA. Weak, so that the library loads into CPU-only builds
// too; there it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mmk::glue {

// Makes the device of `tensor` current for its lifetime, and gives torch's current stream on it.
#ifdef MMK_SIMT
class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  CudaStream stream() const { return nullptr; }
};
#else
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this build of PyTorch has no CUDA support");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<CudaStream>(stream);
  }

  CudaStream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CudaStream stream_;
};
#endif

// `status` is what a launcher of mmk::cuda returned.
inline void check_launch(int status, const char* kernel) {
  STD_TORCH_CHECK(status == cudaSuccess, kernel,
                  ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace mmk::glue
