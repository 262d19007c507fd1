#include "mmkernels/ctc_align.h"
namespace mmk::cuda {
size_t ctc_align_workspace(int64_t, int64_t, int64_t) { return 0; }
int ctc_align(const CtcAlign&, void*, CudaStream) { return 1; }
}
