// The launcher of ctc_align with arguments that ctypes can pass.
#include <cstdint>

#include "mmkernels/ctc_align.h"

// sizes: dtype, batch, frames, classes, tokens, blank, batch_stride, frame_stride
extern "C" int64_t ctc_align_workspace(const int64_t* sizes) {
  return static_cast<int64_t>(mmk::cuda::ctc_align_workspace(sizes[1], sizes[2], sizes[4]));
}

extern "C" int ctc_align(const int64_t* sizes, const void* log_probs, const int64_t* targets,
                         const int64_t* input_lengths, const int64_t* target_lengths, int64_t* paths,
                         int64_t* ends, float* totals, void* workspace) {
  const mmk::CtcAlign args = {static_cast<mmk::DType>(sizes[0]),
                              sizes[1],
                              sizes[2],
                              sizes[3],
                              sizes[4],
                              sizes[5],
                              log_probs,
                              sizes[6],
                              sizes[7],
                              targets,
                              input_lengths,
                              target_lengths,
                              paths,
                              ends,
                              totals};
  return mmk::cuda::ctc_align(args, workspace, nullptr);
}
