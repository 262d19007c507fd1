// For mmkernels/_cuda.py, which calls it through ctypes.
#include <cuda_runtime_api.h>

#include "mmkernels/probe.h"

// Returns null if the kernels run on the current device, else CUDA's message. Writes the CUDA versions, as
// 1000 major + 10 minor, that the driver supports (0: none) and that the kernels were built with.
extern "C" __attribute__((visibility("default"))) const char* mmkernels_cuda_probe(int* driver,
                                                                                   int* built_with) {
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(built_with);
  const int status = mmk::cuda::probe();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(static_cast<cudaError_t>(status));
}
