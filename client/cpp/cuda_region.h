// CUDA shared memory for a request's tensors, so that they never leave the GPU: for a client on the
// workers' machine, where the service allows it (--allow-client-shm).
//
//   auto region = CudaRegion::Create(client, "tensors", /*device=*/0, bytes);
//   request.hidden_states.place = RegionPlace{"tensors", 0};  // its bytes stand at region->data()
//   request.output_place = RegionPlace{"tensors", output_offset};
//
// Workers use tensors that begin at a multiple of 16 bytes where they lie. What writes them on the
// device must have ended before the request is sent; the output is whole once it is answered.
// Windows are the service's for as long as shared_region.h says.
//
// Thread safety: none of its own; the memory is the caller's to share out.
#ifndef EPSERVE_CLIENT_CPP_CUDA_REGION_H_
#define EPSERVE_CLIENT_CPP_CUDA_REGION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/cpp/client.h"

namespace epserve::client {

// Memory of one GPU that other processes can open. Freed with this.
class CudaMemory {
 public:
  // FAILED_PRECONDITION: no such GPU, or this client was built without CUDA. RESOURCE_EXHAUSTED:
  // the GPU is full. INVALID_ARGUMENT: 0 bytes.
  static absl::StatusOr<std::unique_ptr<CudaMemory>> Create(std::uint64_t bytes, int device);
  ~CudaMemory();
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  std::byte* data() const { return data_; }  // of the device
  std::uint64_t size_bytes() const { return size_bytes_; }
  int device() const { return device_; }
  const std::string& handle() const { return handle_; }

  // Copy from and to memory of the host, and wait. INVALID_ARGUMENT: past the end.
  absl::Status Write(std::uint64_t offset_bytes, std::span<const char> bytes);
  absl::Status Read(std::uint64_t offset_bytes, std::span<char> bytes) const;

 private:
  CudaMemory() = default;
  absl::Status CheckInside(std::uint64_t offset_bytes, std::uint64_t size_bytes) const;

  int device_ = 0;
  std::byte* data_ = nullptr;  // null: nothing to free
  std::uint64_t size_bytes_ = 0;
  std::string handle_;
};

// CUDA memory that is registered with a service.
class CudaRegion {
 public:
  // `client` outlives the region. As CudaMemory::Create and InferenceClient::RegisterCudaRegion.
  // `timeout`: of registering, and of the destructor's Unregister.
  static absl::StatusOr<std::unique_ptr<CudaRegion>> Create(
      InferenceClient* client, const std::string& name, std::uint64_t bytes, int device,
      absl::Duration timeout = absl::Seconds(30));
  // Unregisters, unless that has been done. Where that fails the memory is not freed: workers may
  // still have it mapped.
  ~CudaRegion();
  CudaRegion(const CudaRegion&) = delete;
  CudaRegion& operator=(const CudaRegion&) = delete;

  const std::string& name() const { return name_; }
  CudaMemory& memory() { return *memory_; }

  // Returns once no worker has the memory mapped. May be tried again after an error.
  absl::Status Unregister(absl::Duration timeout);

 private:
  CudaRegion(InferenceClient* client, std::string name, absl::Duration timeout,
             std::unique_ptr<CudaMemory> memory);

  InferenceClient* const client_;
  const std::string name_;
  const absl::Duration timeout_;
  std::unique_ptr<CudaMemory> memory_;
  bool registered_ = true;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CUDA_REGION_H_
