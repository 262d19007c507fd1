// Shuffles, votes, counting barriers and atomics.
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"

namespace {

enum class Shuffle : int64_t { kIndex, kUp, kDown, kXor };

// Shuffles of all 32 lanes, in a block of several warps with different values.
__global__ void shuffle(const double* values, double* out, Shuffle kind, int argument, int width) {
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  const double value = values[thread];
  double result = 0.0;
  if (kind == Shuffle::kIndex) result = __shfl_sync(mmk::kFullMask, value, argument, width);
  if (kind == Shuffle::kUp) result = __shfl_up_sync(mmk::kFullMask, value, argument, width);
  if (kind == Shuffle::kDown) result = __shfl_down_sync(mmk::kFullMask, value, argument, width);
  if (kind == Shuffle::kXor) result = __shfl_xor_sync(mmk::kFullMask, value, argument, width);
  out[thread] = result;
}

// Packs the positive values of each block in order, with ballots; counts[block] is their number.
__global__ void compact(const int* values, int* packed, int* counts, int size) {
  MMK_SHARED(int, warp_counts, 32);
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const bool keep = index < size && values[index] > 0;
  const unsigned kept = __ballot_sync(mmk::kFullMask, keep);
  if (mmk::lane_index() == 0) warp_counts[mmk::warp_index()] = __popc(kept);
  const int total = __syncthreads_count(keep);
  int position = __popc(kept & ((1u << mmk::lane_index()) - 1));
  for (int warp = 0; warp < mmk::warp_index(); ++warp) position += warp_counts[warp];
  if (keep) packed[blockIdx.x * blockDim.x + position] = values[index];
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// A histogram in shared memory, added up in global memory; the last block to finish scales it.
__global__ void histogram(const int* values, unsigned* bins, float* frequencies, unsigned* tickets,
                          int size) {
  MMK_SHARED(unsigned, local, 16);
  MMK_SHARED(bool, last, 1);
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (index < size) atomicAdd(&local[values[index] % 16], 1u);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(tickets, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last[0] && threadIdx.x < 16) {
    frequencies[threadIdx.x] = static_cast<float>(bins[threadIdx.x]) / static_cast<float>(size);
  }
}

// max and min of int, max of float by compare-and-swap, sums of four types.
__global__ void extremes(const int* values, int* integers, float* floats, unsigned long long* longs,
                         double* doubles) {
  const int value = values[threadIdx.x];
  atomicMax(&integers[0], value);
  atomicMin(&integers[1], value);
  atomicAdd(&integers[2], value);
  auto* bits = reinterpret_cast<int*>(&floats[0]);
  int seen = atomicAdd(bits, 0);
  while (__int_as_float(seen) < static_cast<float>(value)) {
    const int before = atomicCAS(bits, seen, __float_as_int(static_cast<float>(value)));
    if (before == seen) break;
    seen = before;
  }
  atomicAdd(&floats[1], 0.5f);
  atomicAdd(&longs[0], 1ull << 40);
  atomicAdd(&doubles[0], 0.25);
}

// The position of each thread in the order that the runtime chose.
__global__ void arrival(unsigned* counter, unsigned* place) {
  place[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

// Threads may exit before the others meet: the first `staying` swap values with their neighbours.
template <bool WholeBlock>
__global__ void early_exit(const double* values, double* out, int staying) {
  MMK_SHARED(double, tile, 64);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= staying) return;
  tile[thread] = values[thread];
  if constexpr (WholeBlock) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[thread] = tile[thread ^ 1];
}

}  // namespace

extern "C" int swap_with_early_exit(const double* values, double* out, int64_t staying, int64_t whole_block) {
  const auto kernel = whole_block != 0 ? early_exit<true> : early_exit<false>;
  return mmk::launch(kernel, dim3(1), dim3(64), 0, nullptr, values, out, static_cast<int>(staying));
}
extern "C" int arrival_order(unsigned* counter, unsigned* place, int64_t blocks, int64_t threads) {
  return mmk::launch(arrival, dim3(blocks), dim3(threads), 0, nullptr, counter, place);
}
extern "C" int shuffle_values(const double* values, double* out, int64_t kind, int64_t argument,
                              int64_t width) {
  return mmk::launch(shuffle, dim3(1), dim3(16, 4), 0, nullptr, values, out, static_cast<Shuffle>(kind),
                     static_cast<int>(argument), static_cast<int>(width));
}
extern "C" int compact_values(const int* values, int* packed, int* counts, int64_t size, int64_t blocks) {
  return mmk::launch(compact, dim3(blocks), dim3(96), 0, nullptr, values, packed, counts,
                     static_cast<int>(size));
}
extern "C" int histogram_of(const int* values, unsigned* bins, float* frequencies, unsigned* tickets,
                            int64_t size) {
  if (const cudaError_t error = cudaMemsetAsync(bins, 0, 16 * sizeof(unsigned), nullptr)) return error;
  return mmk::launch(histogram, dim3(mmk::ceil_div<int64_t>(size, 64)), dim3(64), 0, nullptr, values, bins,
                     frequencies, tickets, static_cast<int>(size));
}
extern "C" int extremes_of(const int* values, int* integers, float* floats, unsigned long long* longs,
                           double* doubles, int64_t size) {
  return mmk::launch(extremes, dim3(1), dim3(size), 0, nullptr, values, integers, floats, longs, doubles);
}
