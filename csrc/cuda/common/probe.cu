#include "cuda/common/platform.cuh"
#include "mmkernels/probe.h"

namespace mmk::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

int probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe_kernel));
  cudaGetLastError();
  return error;
}

}  // namespace mmk::cuda
