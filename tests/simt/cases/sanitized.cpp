// A program for ASan and UBSan: runs one case by name on heap buffers of the exact size, in three thread
// orders.
#include <cuda_bf16.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "simt/runtime.h"

extern "C" {
int row_stats_float(const void* x, float* mean, float* largest, int64_t rows, int64_t columns);
int gemm_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int64_t m, int64_t n, int64_t k);
int compact_values(const int* values, int* packed, int* counts, int64_t size, int64_t blocks);
int past_global_fault(const float* in, float* out, int64_t fixed);
int past_static_shared_fault(const float* in, float* out, int64_t fixed);
int past_dynamic_shared_fault(const float* in, float* out, int64_t fixed);
int copy_not_awaited_fault(const float* in, float* out, int64_t fixed);
int divergent_barrier_fault(const float* in, float* out, int64_t fixed);
int lost_lanes_fault(const float* in, float* out, int64_t fixed);
}

namespace {

int correct_kernels() {
  std::vector<float> x(3 * 333, 1.0f);
  std::vector<float> mean(3);
  std::vector<float> largest(3);
  if (const int status = row_stats_float(x.data(), mean.data(), largest.data(), 3, 333)) return status;
  const std::vector<__nv_bfloat16> a(70 * 48, __float2bfloat16(1.0f));
  const std::vector<__nv_bfloat16> b(48 * 64, __float2bfloat16(2.0f));
  std::vector<float> c(70 * 64);
  if (const int status = gemm_bfloat16(a.data(), b.data(), c.data(), 70, 64, 48)) return status;
  const std::vector<int> values(100, 1);
  std::vector<int> packed(192);
  std::vector<int> counts(2);
  if (const int status = compact_values(values.data(), packed.data(), counts.data(), 100, 2)) return status;
  return mean[0] == 1.0f && c.back() == 96.0f && counts[1] == 4 ? 0 : 1;
}

using FaultKernel = int (*)(const float*, float*, int64_t);

int with_buffers(FaultKernel kernel, size_t in_size, bool fixed) {
  const std::vector<float> in(in_size, 1.0f);
  std::vector<float> out(64);
  return kernel(in.data(), out.data(), fixed);
}

int run_case(const std::string& name) {
  if (name == "correct") return correct_kernels();
  if (name == "past_global") return with_buffers(past_global_fault, 64, false);
  if (name == "past_static_shared") return with_buffers(past_static_shared_fault, 64, false);
  if (name == "past_dynamic_shared") return with_buffers(past_dynamic_shared_fault, 64, false);
  if (name == "copy_past_global") return with_buffers(copy_not_awaited_fault, 63, true);
  if (name == "after_faults") {  // a fault must not disturb the next launch
    if (with_buffers(divergent_barrier_fault, 64, false) == 0) return 1;
    if (with_buffers(lost_lanes_fault, 64, false) == 0) return 1;
    mmk_simt_clear_error();
    return correct_kernels();
  }
  std::fprintf(stderr, "unknown case %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  for (uint64_t order = 0; order < 3; ++order) {
    mmk_simt_set_order(order);
    const int status = run_case(argv[1]);
    if (status != 0) {
      std::fprintf(stderr, "%s\n", mmk_simt_last_error());
      return status;
    }
  }
  std::puts("done");
  return 0;
}
