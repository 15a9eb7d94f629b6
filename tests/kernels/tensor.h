// A tensor of a test: what the CPU kernels see, what the CUDA kernels see, and whether each wrote what it should and
// nothing else. Every tensor is an allocation of its own that ends with its last element.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpp/check.h"
#include "values.h"

namespace check {

using Bytes = std::vector<unsigned char>;

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    if (bytes > 0) cuda_check(cudaMalloc(&data_, bytes), "cudaMalloc");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* data() const { return data_; }
  void fill(int byte) {
    if (bytes_ > 0) cuda_check(cudaMemset(data_, byte, bytes_), "cudaMemset");
  }
  void write(const Bytes& bytes) {
    if (bytes_ > 0) cuda_check(cudaMemcpy(data_, bytes.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Bytes read() const {
    Bytes bytes(bytes_);
    if (bytes_ > 0) cuda_check(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return bytes;
  }

 private:
  std::size_t bytes_;
  void* data_ = nullptr;
};

enum class Role {
  input,
  output,    // filled with one byte in the first run and another in the second: what is not written differs
  in_place,  // read and overwritten
};

// What two runs left behind, in one number: equal for every order in which blocks and threads may run.
inline std::uint64_t& fingerprint() {
  static std::uint64_t value = 0;
  return value;
}

class Tensor {
 public:
  // offsets: of the logical elements in their order, counted from the start of the allocation.
  Tensor(std::string name, Dtype dtype, std::vector<std::int64_t> offsets)
      : name_(std::move(name)),
        dtype_(dtype),
        offsets_(std::move(offsets)),
        count_(offsets_.empty() ? 0 : *std::max_element(offsets_.begin(), offsets_.end()) + 1),
        cpu_(count_ * size_of(dtype), kPoison[1]),
        device_(cpu_.size()) {}

  const std::string& name() const { return name_; }
  Dtype dtype() const { return dtype_; }
  std::int64_t size() const { return static_cast<std::int64_t>(offsets_.size()); }
  const std::vector<std::int64_t>& offsets() const { return offsets_; }

  // Where element `first` of the allocation lies; null where there is none.
  void* on_cpu(std::int64_t first = 0) { return count_ > 0 ? cpu_.data() + first * size_of(dtype_) : nullptr; }
  void* on_device(std::int64_t first = 0) {
    return count_ > 0 ? static_cast<unsigned char*>(device_.data()) + first * size_of(dtype_) : nullptr;
  }

  void set(std::int64_t k, double value) { write(cpu_.data(), dtype_, offsets_[k], value); }
  double of_cpu(std::int64_t k) const { return read(cpu_.data(), dtype_, offsets_[k]); }
  double of_device(std::int64_t k) const { return read(result_.data(), dtype_, offsets_[k]); }

  // To be called once an input has its values; gaps between them hold NaN, or -1.
  void upload() {
    image_ = cpu_;
    device_.write(image_);
  }

  // A result that the next pass reads. Each backend reads its own.
  void becomes_input() {
    role_ = Role::input;
    image_ = result_;
  }
  void takes_role(Role role) { role_ = role; }

  void prepare_cpu(int fill) {
    if (role_ == Role::output) std::fill(cpu_.begin(), cpu_.end(), static_cast<unsigned char>(fill));
    if (role_ == Role::in_place) cpu_ = image_;
  }

  void prepare_device(int run) {
    if (role_ == Role::output) device_.fill(kPoison[run]);
    if (role_ == Role::in_place) device_.write(image_);
  }

  void collect(int run, const char* pass) {
    const Bytes bytes = device_.read();
    if (role_ == Role::input) {
      EXPECT(bytes == image_, "%s: %s has changed its input", name_.c_str(), pass);
      return;
    }
    if (run == 0) {
      result_ = bytes;
      return;
    }
    const std::size_t size = size_of(dtype_);
    std::vector<bool> exists(count_, false);
    for (const std::int64_t offset : offsets_) exists[offset] = true;
    for (std::int64_t i = 0; i < count_; ++i) {
      const unsigned char *first = result_.data() + i * size, *second = bytes.data() + i * size;
      if (exists[i]) {
        EXPECT(std::memcmp(first, second, size) == 0, "%s: %s leaves element %ld of %ld as it was, or two values in it",
               name_.c_str(), pass, long(i), long(count_));
      } else {
        EXPECT(is_untouched(first, i, 0) && is_untouched(second, i, 1), "%s: %s writes between elements, at %ld of %ld",
               name_.c_str(), pass, long(i), long(count_));
      }
    }
    for (const std::int64_t offset : offsets_) {
      for (std::size_t b = 0; b < size; ++b) {
        fingerprint() = (fingerprint() ^ bytes[offset * size + b]) * 0x100000001b3u;
      }
    }
    result_ = bytes;
  }

 private:
  static constexpr unsigned char kPoison[2] = {0x7f, 0xff};

  bool is_untouched(const unsigned char* bytes, std::int64_t index, int run) const {
    for (std::int64_t b = 0; b < size_of(dtype_); ++b) {
      const int expected = role_ == Role::in_place ? image_[index * size_of(dtype_) + b] : kPoison[run];
      if (bytes[b] != expected) return false;
    }
    return true;
  }

  std::string name_;
  Dtype dtype_;
  std::vector<std::int64_t> offsets_;
  std::int64_t count_;
  Role role_ = Role::output;
  Bytes image_;   // an input's bytes, on both sides
  Bytes cpu_;     // what the CPU kernels work on
  Bytes result_;  // what the CUDA kernels have left
  DeviceMemory device_;
};

// The offsets of `count` elements that follow one another, from element `first` on.
inline std::vector<std::int64_t> in_a_row(std::int64_t count, std::int64_t first = 0) {
  std::vector<std::int64_t> offsets(count);
  for (std::int64_t k = 0; k < count; ++k) offsets[k] = first + k;
  return offsets;
}

}  // namespace check
