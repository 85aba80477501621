// System shared memory for a request's tensors, so that they travel through no socket: for a client
// on the service's machine, as the service's user, where the service allows it
// (--allow-client-shm).
//
//   auto region = SharedRegion::Create(client, "tensors", bytes);
//   request.hidden_states.place = RegionPlace{"tensors", 0};     // its bytes stand at
//   region->data() request.output_place = RegionPlace{"tensors", output_offset};
//
// Until a request is answered its windows are the service's. After an error other than
// INVALID_ARGUMENT or NOT_FOUND its output window may still be written, until Unregister has
// returned.
//
// Thread safety: none of its own; the memory is the caller's to share out.
#ifndef EPSERVE_CLIENT_CPP_SHARED_REGION_H_
#define EPSERVE_CLIENT_CPP_SHARED_REGION_H_

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

// A POSIX shared-memory object of this process, mapped, all of it backed by memory. Its name goes
// with this at the latest, its memory once nobody holds it any more.
class SharedMemory {
 public:
  // `key_prefix` as the service asks for (--shm-key-prefix); a part that makes the key unique
  // follows. RESOURCE_EXHAUSTED: shared memory is full. INVALID_ARGUMENT: 0 bytes, or a prefix that
  // is no name.
  static absl::StatusOr<std::unique_ptr<SharedMemory>> Create(std::uint64_t bytes,
                                                              const std::string& key_prefix);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  const std::string& key() const { return key_; }
  std::span<std::byte> bytes() const { return bytes_; }

  // Nobody can open it by its key any more; those who have it open keep it. So nothing is left of
  // it, however this process ends, once they let go.
  void RemoveName();

 private:
  SharedMemory() = default;

  std::string key_;
  bool named_ = false;
  std::span<std::byte> bytes_;  // empty: nothing to unmap
};

struct SharedRegionOptions {
  std::string key_prefix = "client-";
  absl::Duration timeout = absl::Seconds(30);  // of registering, and of the destructor's Unregister
};

// Shared memory that is registered with a service, which opens it by its key then: the key is gone
// afterwards.
class SharedRegion {
 public:
  // `client` outlives the region. As SharedMemory::Create and InferenceClient::RegisterRegion.
  static absl::StatusOr<std::unique_ptr<SharedRegion>> Create(
      InferenceClient* client, const std::string& name, std::uint64_t bytes,
      const SharedRegionOptions& options = {});
  // Unregisters, unless that has been done.
  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  const std::string& name() const { return name_; }
  std::span<std::byte> bytes() const { return memory_->bytes(); }

  // Returns once the service uses the region no more. May be tried again after an error.
  absl::Status Unregister(absl::Duration timeout);

 private:
  SharedRegion(InferenceClient* client, std::string name, absl::Duration timeout,
               std::unique_ptr<SharedMemory> memory);

  InferenceClient* const client_;
  const std::string name_;
  const absl::Duration timeout_;
  const std::unique_ptr<SharedMemory> memory_;
  bool registered_ = true;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_SHARED_REGION_H_
