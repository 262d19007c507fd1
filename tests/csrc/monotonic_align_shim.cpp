// The launcher of monotonic_align with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/monotonic_align.h"

// sizes: dtype, batch, frames, tokens, batch_stride, frame_stride; null lengths are those of the sizes.
extern "C" int monotonic_align(const int64_t* sizes, const void* log_probs, const int64_t* frame_lengths,
                               const int64_t* token_lengths, int64_t* durations, void* words, void* states) {
  const auto dtype = static_cast<mmk::DType>(sizes[0]);
  return mmk::cuda::monotonic_align({dtype, log_probs, sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                                     frame_lengths, token_lengths, durations, words, states},
                                    nullptr);
}
