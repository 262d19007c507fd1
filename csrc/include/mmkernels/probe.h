// Whether the CUDA kernels of this library run on a device.
#pragma once

namespace mmk::cuda {

// What CUDA answers about an empty kernel on the current device: cudaSuccess, or the error that every launch
// of this library would end in, as for a driver that is too old or an architecture without an image. Waits
// for nothing and leaves no error behind.
int probe();

}  // namespace mmk::cuda
