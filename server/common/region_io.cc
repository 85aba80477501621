#include "server/common/region_io.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::server {
namespace {

std::string Subject(std::string_view region) {
  return absl::StrCat("shared memory: region ", std::string(region));
}

absl::Status Truncated(std::string_view region, std::uint64_t needed, std::uint64_t given) {
  return absl::InvalidArgumentError(
      absl::StrCat(Subject(region), " has been truncated since it was registered: ", needed,
                   " bytes of its object are needed, ", given, " are left; register it anew"));
}

absl::Status CallFailed(std::string_view region, const char* call, int error) {
  const std::string message = absl::StrCat(Subject(region), ": ", call, ": ", std::strerror(error));
  return error == ENOSPC ? absl::ResourceExhaustedError(message) : absl::InternalError(message);
}

}  // namespace

absl::Status CheckObjectReaches(int fd, std::string_view region, std::uint64_t offset_bytes,
                                std::uint64_t size_bytes) {
  struct stat now = {};
  if (::fstat(fd, &now) != 0) return CallFailed(region, "fstat", errno);
  const std::uint64_t needed = offset_bytes + size_bytes;
  const auto given = static_cast<std::uint64_t>(std::max<off_t>(now.st_size, 0));
  return needed > given ? Truncated(region, needed, given) : absl::OkStatus();
}

absl::Status ReadObject(int fd, std::string_view region, std::uint64_t offset_bytes,
                        std::span<char> destination) {
  EPS_RETURN_IF_ERROR(CheckObjectReaches(fd, region, offset_bytes, destination.size()));
  auto position = static_cast<off_t>(offset_bytes);
  while (!destination.empty()) {
    const ssize_t got = ::pread(fd, destination.data(), destination.size(), position);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return CallFailed(region, "pread", errno);
    if (got == 0) {
      const auto end = static_cast<std::uint64_t>(position);
      return Truncated(region, end + destination.size(), end);
    }
    destination = destination.subspan(static_cast<std::size_t>(got));
    position += got;
  }
  return absl::OkStatus();
}

absl::Status WriteObject(int fd, std::string_view region, std::uint64_t offset_bytes,
                         std::span<const char> source) {
  EPS_RETURN_IF_ERROR(CheckObjectReaches(fd, region, offset_bytes, source.size()));
  auto position = static_cast<off_t>(offset_bytes);
  while (!source.empty()) {
    const ssize_t put = ::pwrite(fd, source.data(), source.size(), position);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return CallFailed(region, "pwrite", put == 0 ? ENOSPC : errno);
    source = source.subspan(static_cast<std::size_t>(put));
    position += put;
  }
  return absl::OkStatus();
}

}  // namespace epserve::server
