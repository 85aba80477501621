// Owners of plain device memory, of pinned host memory that the device can reach, and of the
// pinning of other people's. Move-only.
#ifndef EPSERVE_RUNTIME_BASE_CUDA_MEMORY_H_
#define EPSERVE_RUNTIME_BASE_CUDA_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>
#include <utility>

#include "absl/status/statusor.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {

class DeviceBuffer {
 public:
  // Zeroed. RESOURCE_EXHAUSTED: the device has not that much free.
  static absl::StatusOr<DeviceBuffer> Create(std::size_t bytes) {
    DeviceBuffer buffer;
    EPS_CUDA_RETURN_IF_ERROR(cudaMalloc(&buffer.data_, bytes > 0 ? bytes : 1));
    EPS_CUDA_RETURN_IF_ERROR(cudaMemset(buffer.data_, 0, bytes));
    // cudaMemset returns early, and streams of the non-blocking kind do not wait for it.
    EPS_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(cudaStreamLegacy));
    return buffer;
  }
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

class PinnedBuffer {
 public:
  static absl::StatusOr<PinnedBuffer> Create(std::size_t bytes) {
    PinnedBuffer buffer;
    EPS_CUDA_RETURN_IF_ERROR(
        cudaHostAlloc(&buffer.data_, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    return buffer;
  }
  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~PinnedBuffer() {
    if (data_ != nullptr) (void)cudaFreeHost(data_);
  }
  // With unified addressing the device uses the same pointer.
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// Memory of the host's that somebody else owns, pinned for as long as this lives, so that the
// device reaches it. It must not be given back before.
class PinnedRange {
 public:
  static absl::StatusOr<PinnedRange> Pin(std::span<std::byte> memory) {
    PinnedRange range;
    if (memory.empty()) return range;
    EPS_CUDA_RETURN_IF_ERROR(cudaHostRegister(memory.data(), memory.size(),
                                              cudaHostRegisterPortable | cudaHostRegisterMapped));
    range.data_ = memory.data();
    return range;
  }
  PinnedRange() = default;
  PinnedRange(PinnedRange&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  PinnedRange& operator=(PinnedRange&& other) noexcept {
    PinnedRange old(std::exchange(data_, std::exchange(other.data_, nullptr)));
    return *this;
  }
  ~PinnedRange() {
    if (data_ != nullptr) (void)cudaHostUnregister(data_);
  }

 private:
  explicit PinnedRange(void* data) : data_(data) {}

  void* data_ = nullptr;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_CUDA_MEMORY_H_
