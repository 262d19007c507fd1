// Declares for g++ the CUDA C++ that nvcc has built in. cuda/common/platform.cuh includes it under MMK_SIMT.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static_assert(false, "shared memory is declared with MMK_SHARED or MMK_DYNAMIC_SMEM");
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __builtin_assume(condition) static_cast<void>(0)

// Set by the runtime each time it switches to another thread.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

#include "simt/atomics.h"
#include "simt/math_functions.h"
#include "simt/runtime.h"
#include "simt/tensor_core.h"
#include "simt/warp.h"
