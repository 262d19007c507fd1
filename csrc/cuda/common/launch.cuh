// The only way to start a kernel: handles the shared memory opt-in, the error, and the host SIMT runtime.
#pragma once

#include "cuda/common/platform.cuh"

namespace mmk {

template <class Integer>
MMK_HOST_DEVICE constexpr Integer ceil_div(Integer dividend, Integer divisor) {
  return (dividend + divisor - 1) / divisor;
}

// Without opt-in a block gets 48 KiB of static and dynamic shared memory together. launch() knows the dynamic
// part only, so it opts in well below that; the opt-in costs nothing.
inline constexpr size_t kDynamicSharedMemoryWithoutOptIn = 32 * 1024;

namespace detail {

template <class... Params, class... Args>
cudaError_t launch(bool overlapping, void (*kernel)(Params...), dim3 grid, dim3 block,
                   size_t dynamic_smem_bytes, cudaStream_t stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument for each kernel parameter");
  if (dynamic_smem_bytes > kDynamicSharedMemoryWithoutOptIn) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_smem_bytes));
    if (error != cudaSuccess) return error;
  }
#ifdef MMK_SIMT
  return simt::launch(overlapping, kernel, grid, block, dynamic_smem_bytes, stream,
                      static_cast<Args&&>(args)...);
#else
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

// An attribute of the current device, for launch plans.
inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

inline cudaError_t multiprocessor_count(int* count) {
  return device_attribute(cudaDevAttrMultiProcessorCount, count);
}

// The most shared memory of one block, in bytes; launch() does the opt-in for it.
inline cudaError_t shared_memory_limit(int* bytes) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes);
}

// Starts kernel<<<grid, block, dynamic_smem_bytes, stream>>>(args...) and returns the error of this launch;
// it neither reads nor clears that of an earlier call. A grid with a zero extent is an error: callers return
// before launching. The host SIMT runtime runs the kernel to its end and returns an error for a fault.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_smem_bytes,
                   cudaStream_t stream, Args&&... args) {
  return detail::launch(false, kernel, grid, block, dynamic_smem_bytes, stream, static_cast<Args&&>(args)...);
}

// As launch, right after a kernel on the same stream that calls grid_dependency_launch(). From sm_90 on this
// kernel may start before that one has ended: every block must call grid_dependency_wait() before it reads
// that kernel's results, and before it reads earlier ones if that kernel was launched overlapping as well.
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
