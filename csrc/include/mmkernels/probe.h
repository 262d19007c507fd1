// Whether the CUDA kernels of this library run on a device.
#pragma once

namespace mmk::cuda {

// Queries an empty kernel on the current device: returns cudaSuccess, or the error of every launch of this
// library, such as for a driver that is too old or an architecture without an image. Does not synchronise,
// and clears the error.
int probe();

}  // namespace mmk::cuda
