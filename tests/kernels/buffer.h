// A tensor's memory on the host, where the CPU kernel and the references read it, and on the device; each in one
// allocation that ends with the last element, so that a checker sees the first byte beyond.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpp/check.h"
#include "kernels/types.h"

using fusedloss::Dtype;

// In every type a number that no loss here comes near, and not NaN: what has not been written is seen.
inline constexpr int kPoison = 0x5b;

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline std::int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
    case Dtype::int64: return 8;
    case Dtype::float32:
    case Dtype::int32: return 4;
    case Dtype::uint8:
    case Dtype::int8: return 1;
    default: return 2;
  }
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "uint8",
                                    "int8",    "int16",   "int32",    "int64"};
  return kNames[static_cast<int>(dtype)];
}

inline bool is_floating(Dtype dtype) { return static_cast<int>(dtype) < 4; }

// Half a unit in the last place of 1: what rounding to the type loses, relative to the value.
inline double rounding(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 0x1p-53;
    case Dtype::float32: return 0x1p-24;
    case Dtype::float16: return 0x1p-11;
    default: return 0x1p-8;  // bfloat16
  }
}

// The same of numbers too small for that: half the smallest one. The device may flush float32's to zero.
inline double smallest(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 0x1p-1022;
    case Dtype::float16: return 0x1p-25;
    default: return 0x1p-126;
  }
}

inline Dtype accumulate_type(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

class Buffer {
 public:
  Buffer() = default;
  // `lead` elements lie before the first: with one, no packet is aligned.
  Buffer(Dtype dtype, std::int64_t count, int lead = 0)
      : dtype_(dtype), count_(count), lead_(lead), host_((count + lead) * bytes_of(dtype), char(kPoison)) {
    require(cudaMalloc(&device_, host_.empty() ? 1 : host_.size()), "cudaMalloc");
    upload();
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(count_, other.count_);
    std::swap(lead_, other.lead_);
    std::swap(host_, other.host_);
    std::swap(got_, other.got_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~Buffer() {
    if (device_) cudaFree(device_);
  }

  explicit operator bool() const { return device_ != nullptr; }
  Dtype dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }

  void* data(bool on_device) const {
    if (!device_) return nullptr;
    char* base = on_device ? static_cast<char*>(device_) : const_cast<char*>(host_.data());
    return base + lead_ * bytes_of(dtype_);
  }

  double at(std::int64_t i) const { return read(host_, i); }  // on the host
  double got(std::int64_t i) const { return read(got_, i); }  // what download() has brought
  bool is_poison(std::int64_t i) const { return is_poison_at((i + lead_) * bytes_of(dtype_), bytes_of(dtype_)); }
  const std::vector<char>& got_bytes() const { return got_; }
  bool lead_is_poison() const { return is_poison_at(0, lead_ * bytes_of(dtype_)); }

  void set(std::int64_t i, double value) {
    char* to = host_.data() + (i + lead_) * bytes_of(dtype_);
    const auto put = [&](auto converted) { std::memcpy(to, &converted, sizeof(converted)); };
    switch (dtype_) {
      case Dtype::float32: return put(static_cast<float>(value));
      case Dtype::float64: return put(value);
      case Dtype::bfloat16: return put(__float2bfloat16_rn(static_cast<float>(value)));
      case Dtype::float16: return put(__float2half_rn(static_cast<float>(value)));
      case Dtype::uint8: return put(static_cast<std::uint8_t>(value));
      case Dtype::int8: return put(static_cast<std::int8_t>(value));
      case Dtype::int16: return put(static_cast<std::int16_t>(value));
      case Dtype::int32: return put(static_cast<std::int32_t>(value));
      case Dtype::int64: return put(static_cast<std::int64_t>(value));
    }
  }

  void upload() {
    if (!host_.empty()) {
      require(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice), "upload");
    }
  }
  void download() {
    got_.resize(host_.size());
    if (!host_.empty()) require(cudaMemcpy(got_.data(), device_, host_.size(), cudaMemcpyDeviceToHost), "download");
  }
  void poison() {
    std::fill(host_.begin(), host_.end(), char(kPoison));
    upload();
  }
  void copy_from(const Buffer& other) {
    for (std::int64_t i = 0; i < count_; ++i) copy_element(i, other);
    upload();
  }

 private:
  void copy_element(std::int64_t i, const Buffer& other) {
    const std::int64_t size = bytes_of(dtype_);
    std::memcpy(host_.data() + (i + lead_) * size, other.host_.data() + (i + other.lead_) * size, size);
  }

  double read(const std::vector<char>& bytes, std::int64_t i) const {
    const char* from = bytes.data() + (i + lead_) * bytes_of(dtype_);
    const auto get = [&]<class T>(T value) {
      std::memcpy(&value, from, sizeof(value));
      return value;
    };
    switch (dtype_) {
      case Dtype::float32: return get(float());
      case Dtype::float64: return get(double());
      case Dtype::bfloat16: return __bfloat162float(get(__nv_bfloat16()));
      case Dtype::float16: return __half2float(get(__half()));
      case Dtype::uint8: return get(std::uint8_t());
      case Dtype::int8: return get(std::int8_t());
      case Dtype::int16: return get(std::int16_t());
      case Dtype::int32: return get(std::int32_t());
      default: return static_cast<double>(get(std::int64_t()));
    }
  }

  bool is_poison_at(std::int64_t byte, std::int64_t count) const {
    for (std::int64_t i = byte; i < byte + count; ++i) {
      if (got_[i] != char(kPoison)) return false;
    }
    return true;
  }

  Dtype dtype_ = Dtype::float32;
  std::int64_t count_ = 0;
  int lead_ = 0;
  std::vector<char> host_, got_;
  void* device_ = nullptr;
};

// Uniform in [0, 1), the same numbers everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  double uniform() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<double>(state_ >> 11) * 0x1p-53;
  }
  // The sum of four is close to normal, and bounded.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.7320508; }
  std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(uniform() * static_cast<double>(limit)); }

 private:
  std::uint64_t state_;
};

// NaN agrees with NaN, an infinity with itself, and a number with what is no farther than `tolerance`.
inline bool agree(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= tolerance;
}

inline int& cases() {
  static int count = 0;
  return count;
}
