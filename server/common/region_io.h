// Reads and writes of client-owned shared memory through a descriptor: never a mapping, because a
// client may truncate its object at any time, and whoever touches a mapping past its end dies.
// Here that is an error. `region` is how an error names it.
// Thread-safe. What another process writes meanwhile may or may not be seen.
#ifndef EPSERVE_SERVER_COMMON_REGION_IO_H_
#define EPSERVE_SERVER_COMMON_REGION_IO_H_

#include <cstdint>
#include <span>
#include <string_view>

#include "absl/status/status.h"

namespace epserve::server {

// [offset, offset + size) inside [0, cap), without wrap-around.
constexpr bool Fits(std::uint64_t offset, std::uint64_t size, std::uint64_t cap) {
  return size <= cap && offset <= cap - size;
}

// INVALID_ARGUMENT: the object ends before [offset, offset + size) does. REQUIRES, here and below:
// the two fit an off_t together.
absl::Status CheckObjectReaches(int fd, std::string_view region, std::uint64_t offset_bytes,
                                std::uint64_t size_bytes);

// INVALID_ARGUMENT: the object is too short, or becomes so meanwhile; nothing is promised of
// `destination` then.
absl::Status ReadObject(int fd, std::string_view region, std::uint64_t offset_bytes,
                        std::span<char> destination);

// An object found too short stays so; one that is truncated after that check grows again by the
// write, which is the client's own memory. RESOURCE_EXHAUSTED: it has holes, and the file system no
// room for them.
absl::Status WriteObject(int fd, std::string_view region, std::uint64_t offset_bytes,
                         std::span<const char> source);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_REGION_IO_H_
