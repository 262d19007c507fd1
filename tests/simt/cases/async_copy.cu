// cp.async of each size, whole or filled with zeros, in two groups.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace {

constexpr int kThreads = 32;

// Thread t copies its Bytes twice: all to `whole`, and to `filled` only if t < valid. Only the second group
// is in flight when the first is read.
template <int Bytes>
__global__ void copy(const uint32_t* in, uint32_t* whole, uint32_t* filled, int valid) {
  constexpr int kWords = Bytes / 4;
  MMK_SHARED(uint32_t, first, kThreads, kWords);
  MMK_SHARED(uint32_t, second, kThreads, kWords);
  const int thread = static_cast<int>(threadIdx.x);
  mmk::cp_async<Bytes>(first[thread], in + thread * kWords);
  mmk::cp_async_commit_group();
  mmk::cp_async_zfill<Bytes>(second[thread], in + thread * kWords, thread < valid);
  mmk::cp_async_commit_group();
  mmk::cp_async_wait_group<1>();
  for (int i = 0; i < kWords; ++i) whole[thread * kWords + i] = first[thread][i];
  mmk::cp_async_wait_group<0>();
  for (int i = 0; i < kWords; ++i) filled[thread * kWords + i] = second[thread][i];
}

}  // namespace

// Arrays of 32 * bytes.
extern "C" int async_copies(const uint32_t* in, uint32_t* whole, uint32_t* filled, int64_t bytes,
                            int64_t valid) {
  const auto kernel = bytes == 4 ? copy<4> : bytes == 8 ? copy<8> : copy<16>;
  return mmk::launch(kernel, dim3(1), dim3(kThreads), 0, nullptr, in, whole, filled, static_cast<int>(valid));
}
