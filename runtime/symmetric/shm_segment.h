// The steps that make a piece of POSIX shared memory, one move-only handle each, so that an early
// return unwinds exactly what was done: a name in the system, an open descriptor, a mapping.
// Thread safety: none of its own; a handle is used by one thread at a time.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_SHM_SEGMENT_H_
#define EPSERVE_RUNTIME_SYMMETRIC_SHM_SEGMENT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/unique_fd.h"

namespace epserve::runtime {

// Where the names of POSIX shared memory stand as files on Linux.
inline constexpr char kShmDirectory[] = "/dev/shm";

// What helps where a system call on kShmDirectory fails with `error`, to end a message with; may be
// empty.
std::string ShmRemedy(int error);

// A name in the shared-memory namespace ("/epserve-..."), removed when this goes.
class SegmentName {
 public:
  SegmentName() = default;
  explicit SegmentName(std::string name) : name_(std::move(name)) {}
  SegmentName(SegmentName&& other) noexcept : name_(std::exchange(other.name_, {})) {}
  SegmentName& operator=(SegmentName&& other) noexcept {
    std::swap(name_, other.name_);
    return *this;
  }
  SegmentName(const SegmentName&) = delete;
  SegmentName& operator=(const SegmentName&) = delete;
  ~SegmentName() { Unlink(); }

  // Removes the name now. The memory stays with those who have it mapped.
  void Unlink();

 private:
  std::string name_;  // empty: nothing to remove
};

// Memory mapped read-write and shared, unmapped when this goes.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // Maps all `bytes` of `fd` and brings every page in, so that no batch pays for page faults.
  static absl::StatusOr<Mapping> Map(const UniqueFd& fd, std::uint64_t bytes);

  std::byte* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
};

struct CreatedSegment {
  SegmentName name;
  UniqueFd fd;  // Holds the lock that tells the living from the dead; see stale_heaps.h.
};

// Makes a new segment of `bytes` zero bytes, readable by this user alone, with its memory reserved,
// so that no later touch of it can fail. ALREADY_EXISTS: the name is taken, or was taken away while
// it was made; try another. RESOURCE_EXHAUSTED: shared memory is full; says needed and free.
absl::StatusOr<CreatedSegment> CreateSegment(const std::string& name, std::uint64_t bytes);

// Opens a segment of this user that has exactly `bytes`. NOT_FOUND: no such name.
// PERMISSION_DENIED: another user's. INVALID_ARGUMENT: not a plain segment of that size.
absl::StatusOr<UniqueFd> OpenSegment(const std::string& name, std::uint64_t bytes);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_SHM_SEGMENT_H_
