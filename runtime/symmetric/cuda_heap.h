// Symmetric memory on GPUs: one physical allocation a rank, mapped by its owner and by every peer
// through CUDA's virtual memory management, shared as a POSIX file descriptor or, where the driver
// grants it, as a fabric handle. Works where each process sees only its own GPU through
// CUDA_VISIBLE_DEVICES.
//
// Ownership: one move-only handle a step (allocation, address range, mapping), so that whatever
// fails half-way unwinds what was done. The current device must be the same at creation and at
// destruction. Not thread-safe.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_CUDA_HEAP_H_
#define EPSERVE_RUNTIME_SYMMETRIC_CUDA_HEAP_H_

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/unique_fd.h"
#include "runtime/symmetric/cuda_heap_handle.h"

namespace epserve::runtime {

// Physical device memory (a CUmemGenericAllocationHandle).
class DeviceAllocation {
 public:
  // `bytes` is rounded up to the device's granularity (2 MiB on H200).
  // RESOURCE_EXHAUSTED: the device has not that much free; the message says how much it has.
  static absl::StatusOr<DeviceAllocation> Create(std::size_t bytes,
                                                 HandleType type = HandleType::kFd);
  // Takes part in an allocation that a peer exported. `fd` stays the caller's.
  static absl::StatusOr<DeviceAllocation> Import(int fd, std::size_t bytes);
  static absl::StatusOr<DeviceAllocation> Import(const FabricHandle& handle, std::size_t bytes);
  DeviceAllocation() = default;
  DeviceAllocation(DeviceAllocation&& other) noexcept { Swap(other); }
  DeviceAllocation& operator=(DeviceAllocation&& other) noexcept {
    Swap(other);
    return *this;
  }
  ~DeviceAllocation();

  absl::StatusOr<UniqueFd> Export() const;            // REQUIRES: HandleType::kFd
  absl::StatusOr<FabricHandle> ExportFabric() const;  // REQUIRES: HandleType::kFabric
  std::size_t bytes() const { return bytes_; }
  std::uint64_t handle() const { return handle_; }

 private:
  void Swap(DeviceAllocation& other) {
    std::swap(handle_, other.handle_);
    std::swap(bytes_, other.bytes_);
  }
  std::uint64_t handle_ = 0;
  std::size_t bytes_ = 0;
};

// OK if the driver grants fabric handles on the current device: creates, exports and imports one.
// FAILED_PRECONDITION says what is missing.
absl::Status ProbeFabricHandles();

// A reserved range of device addresses.
class AddressRange {
 public:
  static absl::StatusOr<AddressRange> Reserve(std::size_t bytes);
  AddressRange() = default;
  AddressRange(AddressRange&& other) noexcept { Swap(other); }
  AddressRange& operator=(AddressRange&& other) noexcept {
    Swap(other);
    return *this;
  }
  ~AddressRange();
  std::uint64_t address() const { return address_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void Swap(AddressRange& other) {
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
  }
  std::uint64_t address_ = 0;
  std::size_t bytes_ = 0;
};

// An allocation mapped into an address range, readable and writable by the current device.
class DeviceMapping {
 public:
  static absl::StatusOr<DeviceMapping> Map(DeviceAllocation allocation);
  DeviceMapping() = default;
  DeviceMapping(DeviceMapping&& other) noexcept { Swap(other); }
  DeviceMapping& operator=(DeviceMapping&& other) noexcept {
    Swap(other);
    return *this;
  }
  ~DeviceMapping();
  std::byte* data() const { return reinterpret_cast<std::byte*>(range_.address()); }
  std::size_t bytes() const { return allocation_.bytes(); }
  const DeviceAllocation& allocation() const { return allocation_; }

 private:
  void Swap(DeviceMapping& other) {
    std::swap(allocation_, other.allocation_);
    std::swap(range_, other.range_);
    std::swap(mapped_, other.mapped_);
  }
  DeviceAllocation allocation_;
  AddressRange range_;
  bool mapped_ = false;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_CUDA_HEAP_H_
