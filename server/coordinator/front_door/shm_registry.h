// Shared memory that clients have registered for their tensors: system regions and CUDA regions, in
// one namespace.
//
// A CUDA region is a handle and a size here: the coordinator touches no GPU, the workers open the
// handle (see device_region_host.h). What follows is of system regions.
//
// A region is an open descriptor, read and written by pread and pwrite and never mapped; see
// server/common/region_io.h. Workers of this machine get the descriptor itself, by the region's
// number, and so open nothing by a name that a client chose. Descriptors are owned and
// reference-counted: a request holds the region it uses, a batch what its workers use, and
// Unregister() reports back once the last user has let go, so a name or descriptor number used
// again never reaches somebody else's memory.
//
// Clients are not trusted: a key may name only a regular shared-memory object of the server's own
// user, all bounds are unsigned 64-bit without wrap-around, and no error shows a key.
//
// Thread safety: all methods, from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SHM_REGISTRY_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SHM_REGISTRY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "runtime/base/unique_fd.h"

namespace epserve::coordinator {

struct ShmOptions {
  bool allowed = false;                   // --allow-client-shm
  std::vector<std::string> key_prefixes;  // a key must begin with one of these; none: any key
  std::size_t max_regions = 256;
  std::uint64_t max_total_bytes = std::uint64_t{64} << 30;  // over all regions
};

enum class ShmKind { kSystem, kCuda };

struct ShmRegionInfo {
  std::uint64_t id = 0;  // counts up from 1, never used again
  std::string name;
  std::string key;  // as the client gave it; of kSystem
  std::uint64_t offset_bytes = 0;
  std::uint64_t size_bytes = 0;
  ShmKind kind = ShmKind::kSystem;
  std::string handle;          // of kCuda: cudaIpcMemHandle_t
  std::int64_t device_id = 0;  // of kCuda, as the client numbers them
};

// One registered window of a shared-memory object, or CUDA memory. Offsets below are relative to
// the window.
class ShmRegion {
 public:
  ShmRegion(ShmRegionInfo info, runtime::UniqueFd fd);  // no fd: of kCuda

  const ShmRegionInfo& info() const { return info_; }
  const std::string& label() const { return label_; }  // the name as errors show it
  bool is_cuda() const { return info_.kind == ShmKind::kCuda; }
  // Where a byte of the region stands in its object. REQUIRES: inside the region.
  std::uint64_t ObjectOffset(std::uint64_t offset_bytes) const {
    return info_.offset_bytes + offset_bytes;
  }
  // INTERNAL: this process has no descriptor left.
  absl::StatusOr<runtime::UniqueFd> DuplicateDescriptor() const;

  // True where `size` bytes from `offset` on and as many of `other` from `other_offset` on have
  // bytes in common without being the same ones: who reads one while the other is written, row by
  // row, cannot tell old rows from new. Regions may share an object, or a handle.
  bool OverlapsShifted(std::uint64_t offset_bytes, const ShmRegion& other,
                       std::uint64_t other_offset_bytes, std::uint64_t size_bytes) const;

  // OK if [offset, offset + size) lies inside the region, and a system region's object still
  // reaches that far.
  // INVALID_ARGUMENT names needed and given.
  absl::Status CheckWindow(std::uint64_t offset_bytes, std::uint64_t size_bytes) const;

  // REQUIRES, here and below: not of kCuda. Checks the window and copies. What another process
  // writes meanwhile may or may not be seen.
  absl::Status Read(std::uint64_t offset_bytes, std::span<char> destination) const;
  // RESOURCE_EXHAUSTED if the object has holes and the file system no room for them.
  absl::Status Write(std::uint64_t offset_bytes, std::span<const char> source) const;

 private:
  friend class ShmRegistry;

  absl::Status CheckInside(std::uint64_t offset_bytes, std::uint64_t size_bytes) const;

  const ShmRegionInfo info_;
  const std::string label_;
  // Reports the region's end to Unregister(). Stands before fd_, which is thus closed first.
  std::shared_ptr<void> released_;
  runtime::UniqueFd fd_;
  bool pending_ = false;  // guarded by the registry; not to be found yet
};

// `region`: where a tensor lies, or goes; null: not in one. What lies in CUDA memory is not read
// here: workers read it once the batch starts.
inline bool InCuda(const ShmRegion* region) { return region != nullptr && region->is_cuda(); }

// Whether there are keys with that prefix that a client may register.
bool IsKeyPrefix(std::string_view prefix);

class ShmRegistry {
 public:
  explicit ShmRegistry(ShmOptions options);

  // UNIMPLEMENTED, naming the flag, if client shared memory is switched off.
  absl::Status CheckAllowed() const;
  bool allowed() const { return options_.allowed; }

  // ALREADY_EXISTS for a name in use; several names may share one key.
  absl::Status Register(std::string_view name, std::string_view key, std::uint64_t offset_bytes,
                        std::uint64_t size_bytes);

  // Takes the name, and room for it, for CUDA memory that the workers are yet to open: until
  // Confirm() nobody finds it. INVALID_ARGUMENT: the handle is not of 64 bytes, or device_id is
  // negative; else as Register().
  absl::StatusOr<std::shared_ptr<const ShmRegion>> ReserveCuda(std::string_view name,
                                                               std::string_view handle,
                                                               std::int64_t device_id,
                                                               std::uint64_t size_bytes);
  // The workers have it open. ABORTED: it was unregistered meanwhile.
  absl::Status Confirm(const ShmRegion& region);
  // They have not: the name is free again.
  void Withdraw(const ShmRegion& region);

  // Takes the name, or every name of that kind if it is empty, out of the registry at once, and
  // calls `released` with the regions' ids when the last request that uses one of the regions has
  // let go, within this call or later and from any thread; if nothing is registered by that name,
  // at once. `released` must not block. On an error `released` is not called. INVALID_ARGUMENT: the
  // name is of the other kind.
  using Released = std::function<void(const std::vector<std::uint64_t>& ids)>;
  absl::Status Unregister(ShmKind kind, std::string_view name, Released released);

  // NOT_FOUND names the region.
  absl::StatusOr<std::shared_ptr<const ShmRegion>> Find(std::string_view name) const;

  // The descriptor of a region that is registered, or no longer so but still in use. NOT_FOUND.
  absl::StatusOr<runtime::UniqueFd> DuplicateDescriptor(std::uint64_t id) const;

  // One region of that kind, or all if the name is empty, by name.
  absl::StatusOr<std::vector<ShmRegionInfo>> List(ShmKind kind, std::string_view name) const;

 private:
  absl::Status CheckKey(std::string_view name, std::string_view stripped_key) const;
  std::shared_ptr<ShmRegion> Add(ShmRegionInfo info, runtime::UniqueFd fd)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckRoom(std::string_view name, std::uint64_t size_bytes) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ShmOptions options_;
  mutable absl::Mutex mutex_;
  std::map<std::string, std::shared_ptr<ShmRegion>, std::less<>> regions_ ABSL_GUARDED_BY(mutex_);
  // Every region that may still be in use, by id.
  std::map<std::uint64_t, std::weak_ptr<const ShmRegion>> alive_ ABSL_GUARDED_BY(mutex_);
  std::uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  std::uint64_t total_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SHM_REGISTRY_H_
