// Checks every kernel on small and odd problems against a double-precision host reference. Needs no torch, so
// that compute-sanitizer sees only our kernels; the host SIMT runtime (MMK_SIMT) runs it on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "mmkernels/activation.h"
#include "mmkernels/dtype.h"

namespace mmk::check {

using Values = std::vector<double>;

// A failed call of the runtime or launch ends its case; Report::check counts it.
inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
inline void require(int status, const char* what) {
  require(static_cast<cudaError_t>(status), what);
}

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, __half>) return DType::kFloat16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return DType::kBFloat16;
  return DType::kFloat32;
}

template <class T>
const char* dtype_name() {
  if constexpr (std::is_same_v<T, __half>) return "float16";
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return "bfloat16";
  return "float32";
}

// The distance from 1 to the next value of the type.
template <class T>
constexpr double epsilon() {
  if constexpr (std::is_same_v<T, __half>) return 1.0 / 1024;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return 1.0 / 128;
  return 1.0 / 8388608;
}

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(value));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(static_cast<float>(value));
  if constexpr (std::is_integral_v<T>) return static_cast<T>(value);
  if constexpr (std::is_same_v<T, float>) return static_cast<float>(value);
}

template <class T>
double to_double(T value) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(value);
  if constexpr (std::is_arithmetic_v<T>) return static_cast<double>(value);
}

// Values as the type stores them.
template <class T>
Values rounded(Values values) {
  for (double& value : values) value = to_double(from_double<T>(value));
  return values;
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  Values normal(int64_t count, double mean = 0.0, double deviation = 1.0) {
    std::normal_distribution<double> distribution(mean, deviation);
    Values values(static_cast<size_t>(count));
    for (double& value : values) value = distribution(engine_);
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

// Device memory of the exact size, so that sanitizers find accesses past its end.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(static_cast<size_t>(count)) {
    if (count_ == 0) return;
#ifdef MMK_SIMT
    data_ = static_cast<T*>(::operator new(bytes(), kAlignment));
#else
    require(cudaMalloc(reinterpret_cast<void**>(&data_), bytes()), "cudaMalloc");
#endif
  }
  explicit DeviceArray(const Values& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    std::vector<T> host;
    for (double value : values) host.push_back(from_double<T>(value));
    copy(data_, host.data(), true);
  }
  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() {
#ifdef MMK_SIMT
    ::operator delete(data_, kAlignment);
#else
    cudaFree(data_);
#endif
  }

  T* data() const { return data_; }

  Values values() const {
    std::vector<T> host(count_);
    copy(host.data(), data_, false);
    Values result;
    for (T value : host) result.push_back(to_double(value));
    return result;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }

  void copy(T* target, const T* source, [[maybe_unused]] bool to_device) const {
    if (count_ == 0) return;
#ifdef MMK_SIMT
    std::memcpy(static_cast<void*>(target), source, bytes());
#else
    const cudaMemcpyKind kind = to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    require(cudaMemcpy(target, source, bytes(), kind), "cudaMemcpy");
#endif
  }

  static constexpr std::align_val_t kAlignment{256};  // that of cudaMalloc

  T* data_ = nullptr;
  size_t count_;
};

// The activations; derivatives are taken by differences.
inline double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return z > 0 ? z : 0.0;
    case Activation::kGelu:
      return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
    case Activation::kGeluTanh:
      return 0.5 * z * (1 + std::tanh(0.79788456080286535588 * (z + 0.044715 * z * z * z)));
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
  }
  return z;
}

inline double slope(Activation activation, double z) {
  const double step = 1e-5;
  if (activation == Activation::kRelu) return z > 0 ? 1.0 : 0.0;
  return (activate(activation, z + step) - activate(activation, z - step)) / (2 * step);
}

// Compares, prints one line for each failure, and counts.
class Report {
 public:
  // Runs one case. A failure in it is counted, and the next case runs.
  template <class Body>
  void check(const std::string& name, Body&& body) {
    try {
      body();
    } catch (const std::runtime_error& error) {
      ++failures_;
      std::printf("FAILED %s: %s\n", name.c_str(), error.what());
#ifndef MMK_SIMT
      cudaGetLastError();
#endif
    }
    std::fflush(stdout);
  }

  // |got - expected| <= tolerance * max(scale, max |expected|) everywhere
  void compare(const std::string& name, const Values& got, const Values& expected, double tolerance,
               double scale = 0.0) {
    double worst = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
      scale = std::fmax(scale, std::fabs(expected[i]));
      const double error = std::fabs(got[i] - expected[i]);
      worst = error > worst || std::isnan(error) ? error : worst;
      if (std::isnan(worst)) break;
    }
    ++comparisons_;
    if (worst <= tolerance * scale + 1e-30) return;
    ++failures_;
    std::printf("FAILED %s: error %.3e, allowed %.3e\n", name.c_str(), worst, tolerance * scale);
  }

  int finish() const {
    std::printf("%d comparisons, %d failures\n", comparisons_, failures_);
    return failures_ == 0 && comparisons_ > 0 ? 0 : 1;
  }

 private:
  int comparisons_ = 0;
  int failures_ = 0;
};

void check_adapter(Report& report);
void check_ctc_align(Report& report);
void check_layer_mix(Report& report);
void check_layer_project(Report& report);
void check_merge(Report& report);
void check_segment_attention(Report& report);
void check_segment_pool(Report& report);
void check_cif(Report& report);
void check_monotonic_align(Report& report);
void check_distill_loss(Report& report);

}  // namespace mmk::check
