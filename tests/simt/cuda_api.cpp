// The few functions of the CUDA runtime that launchers call, and the device that they see.
#include <cuda_runtime_api.h>

#include <cstring>

#include "simt/runtime.h"

namespace mmk::simt {
namespace {

// An H100, but with few multiprocessors and an odd number, so that persistent kernels loop and have a
// remainder.
Device device = {3, 227 * 1024, 228 * 1024, 2048, 90};

}  // namespace

const Device& current_device() {
  return device;
}

}  // namespace mmk::simt

extern "C" {

void mmk_simt_set_device(const int64_t* attributes) {
  mmk::simt::device = {attributes[0], attributes[1], attributes[2], attributes[3], attributes[4]};
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() {
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const mmk::simt::Device& device = mmk::simt::current_device();
  const auto give = [&](int64_t given) {
    *value = static_cast<int>(given);
    return cudaSuccess;
  };
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return give(device.multiprocessors);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return give(device.shared_per_block);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return give(device.shared_per_multiprocessor);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return give(device.threads_per_multiprocessor);
    case cudaDevAttrComputeCapabilityMajor:
      return give(device.capability / 10);
    case cudaDevAttrComputeCapabilityMinor:
      return give(device.capability % 10);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) return cudaErrorInvalidValue;
  mmk::simt::allow_dynamic_shared(function, static_cast<size_t>(value));
  return cudaSuccess;
}

// Every kernel has an image here.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return mmk_simt_last_error();
    default:
      return "unrecognized error code";
  }
}

}  // extern "C"
