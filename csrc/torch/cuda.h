// For the glue of the CUDA kernels: the current stream, the device guard, the check of a launch, and the
// registration of the ops. With the host SIMT runtime (MMK_SIMT, tests/simt/README.md) the tensors are on the
// CPU, and the ops are mmkernels_simt::..., so that they do not replace those of the CPU kernels.
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

// Only CUDA builds of torch have it. Weak, so that CPU-only builds load the library too; there it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mmk::glue {

// Makes the device of `tensor` current during its lifetime; stream() is torch's current stream there.
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

// Throws unless `status`, from a launcher of mmk::cuda, is cudaSuccess.
inline void check_launch(int status, const char* kernel) {
  const bool capture =
      status >= cudaErrorStreamCaptureUnsupported && status <= cudaErrorStreamCaptureWrongThread;
  STD_TORCH_CHECK(
      status == cudaSuccess, kernel,
      ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)),
      capture ? "; run the step once before a CUDA graph capture, where no kernel can be loaded" : "");
}

}  // namespace mmk::glue
