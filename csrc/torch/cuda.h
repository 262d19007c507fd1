// What the glue of the CUDA kernels needs beside glue.h: the current stream, the device guard, and the check
// of a launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "mmkernels/stream.h"
#include "torch/glue.h"

// Declared by torch only where it is built for CUDA. Weak, so that the library loads into CPU-only builds
// too; there it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mmk::glue {

// Makes the device of `tensor` current for its lifetime, and gives torch's current stream on it.
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

// `status` is what a launcher of mmk::cuda returned.
inline void check_launch(int status, const char* kernel) {
  STD_TORCH_CHECK(status == cudaSuccess, kernel,
                  ": CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace mmk::glue
