// Loops for test_sass.py. `good` is as a loop should be; each of the others has one fault or one feature.

#include "cuda/common/ptx.cuh"

namespace mmk {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

MMK_DEVICE float kept(float x) {
  return x > 0.0f ? x : 0.1f * x;
}

MMK_DEVICE float chosen(float x, int kind) {
  switch (kind) {
    case 0:
      return x > 0.0f ? x : 0.0f;
    case 1:
      return tanhf(x);
    case 2:
      return expf(x) / (1.0f + expf(-x));
    default:
      return x;
  }
}

MMK_DEVICE float sum_of(float4 x) {
  return kept(x.x) + kept(x.y) + kept(x.z) + kept(x.w);
}

}  // namespace

// Four loads of 16 bytes before the first use.
__global__ void good(const float4* in, float* out, int count) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kUnroll * kThreads) {
    float4 part[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) part[k] = in[i + k * kThreads];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) sum += sum_of(part[k]);
  }
  out[threadIdx.x] = sum;
}

// A choice at run time for each element.
__global__ void switched(const float4* in, float* out, int count, int kind) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kUnroll * kThreads) {
    float4 part[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) part[k] = in[i + k * kThreads];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      sum += chosen(part[k].x, kind) + chosen(part[k].y, kind);
      sum += chosen(part[k].z, kind) + chosen(part[k].w, kind);
    }
  }
  out[threadIdx.x] = sum;
}

// Loads of 4 bytes.
__global__ void narrow(const float* in, float* out, int count) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kUnroll * kThreads) {
    float part[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) part[k] = in[i + k * kThreads];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) sum += kept(part[k]);
  }
  out[threadIdx.x] = sum;
}

// One load, used at once.
__global__ void used_at_once(const float4* in, float* out, int count) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) sum += sum_of(in[i]);
  out[threadIdx.x] = sum;
}

// Each load waits for the one before, which has its index.
__global__ void one_after_the_other(const float4* in, float* out, int count) {
  float sum = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kUnroll * kThreads) {
    int index = i;
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const float4 part = in[index];
      sum += sum_of(part);
      index = __float_as_int(part.x);
    }
  }
  out[threadIdx.x] = sum;
}

// Copies to shared memory, two groups ahead of their use.
__global__ void ring(const float4* in, float* out, int count) {
  MMK_SHARED(float4, rows, 3, kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const auto copy = [&](int step) {
    if (step < count) cp_async<16>(&rows[step % 3][thread], in + step * kThreads + thread);
    cp_async_commit_group();
  };
  copy(0);
  copy(1);
  float sum = 0.0f;
#pragma unroll 1
  for (int step = 0; step < count; ++step) {
    copy(step + 2);
    cp_async_wait_group<2>();
    sum += sum_of(rows[step % 3][thread]);
  }
  out[threadIdx.x] = sum;
}

// No loop.
__global__ void straight(const float4* in, float4* out) {
  out[threadIdx.x] = in[threadIdx.x];
}

}  // namespace mmk
