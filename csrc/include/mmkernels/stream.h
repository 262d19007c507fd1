// The stream that CUDA launchers take; it needs no CUDA header.
#pragma once

struct CUstream_st;

namespace mmk {

using CudaStream = CUstream_st*;  // cudaStream_t

}  // namespace mmk
