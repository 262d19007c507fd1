// The only way to start a kernel: one place for the shared memory opt-in, the error, and the host runtime.
#pragma once

#include "cuda/common/platform.cuh"

namespace mmk {

template <class Integer>
MMK_HOST_DEVICE constexpr Integer ceil_div(Integer dividend, Integer divisor) {
  return (dividend + divisor - 1) / divisor;
}

// Dynamic shared memory that needs no opt-in, on every architecture.
inline constexpr size_t kDefaultSharedMemory = 48 * 1024;

namespace detail {

template <class... Params, class... Args>
cudaError_t launch(bool overlapping, void (*kernel)(Params...), dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, cudaStream_t stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument for each kernel parameter");
#ifdef MMK_SIMT
  return simt::launch(overlapping, kernel, grid, block, dynamic_smem_bytes, stream,
                      static_cast<Args&&>(args)...);
#else
  if (dynamic_smem_bytes > kDefaultSharedMemory) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_smem_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_smem_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlapping ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
#endif
}

}  // namespace detail

// Facts of the current device that launch plans use.
inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

inline cudaError_t multiprocessor_count(int* count) {
  return device_attribute(cudaDevAttrMultiProcessorCount, count);
}

// Shared memory that one block may use after the opt-in that launch() does, in bytes.
inline cudaError_t shared_memory_limit(int* bytes) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes);
}

// Starts kernel<<<grid, block, dynamic_smem_bytes, stream>>>(args...) and returns the launch's own error: it
// neither reads nor clears the error of an earlier call. A grid with a zero extent is an error: return before
// launching. On the host runtime it returns when the kernel has ended, with nonzero if a fault was found.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_smem_bytes,
                   cudaStream_t stream, Args&&... args) {
  return detail::launch(false, kernel, grid, block, dynamic_smem_bytes, stream, static_cast<Args&&>(args)...);
}

// As launch, behind a launch() of the same stream whose kernel calls grid_dependency_launch(): this one may
// start before that one has ended (from sm_90 on), and calls grid_dependency_wait() in every block before it
// reads what that one writes. What still earlier kernels wrote is there from the start.
template <class... Params, class... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_smem_bytes,
                               cudaStream_t stream, Args&&... args) {
  int major = 0;
  if (const cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, &major);
      error != cudaSuccess) {
    return error;
  }
  return detail::launch(major >= 9, kernel, grid, block, dynamic_smem_bytes, stream,
                        static_cast<Args&&>(args)...);
}

}  // namespace mmk
