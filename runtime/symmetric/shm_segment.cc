#include "runtime/symmetric/shm_segment.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

absl::Status SystemError(const char* call, const std::string& name, int error) {
  return absl::InternalError(absl::StrCat("shared memory: ", call, " of ", name,
                                          " failed: ", std::strerror(error), ShmRemedy(error)));
}

absl::Status NoSpace(std::uint64_t needed_bytes, const std::string& free_bytes) {
  return absl::ResourceExhaustedError(
      absl::StrCat("shared memory: ", needed_bytes, " bytes needed exceed the ", free_bytes,
                   " bytes free in ", kShmDirectory,
                   "; enlarge it (a container's --shm-size), stop what fills it, or lower "
                   "--max-batch-tokens or --slots"));
}

// Bytes that may still be reserved; UINT64_MAX where the file system has no limit or will not tell.
std::uint64_t FreeBytes(int fd) {
  struct statvfs info;
  if (::fstatvfs(fd, &info) != 0 || info.f_blocks == 0) return UINT64_MAX;
  return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

// Reserves the memory of the segment. Without this the first touch of a page that does not fit
// would kill the process with SIGBUS.
absl::Status Reserve(const UniqueFd& fd, const std::string& name, std::uint64_t bytes) {
  const std::uint64_t free_bytes = FreeBytes(fd.get());
  if (bytes > free_bytes || bytes > INT64_MAX) return NoSpace(bytes, absl::StrCat(free_bytes));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    return SystemError("ftruncate", name, errno);
  }
  int error;
  do {
    error = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error == ENOSPC || error == ENOMEM || error == EFBIG) {
    return NoSpace(bytes, absl::StrCat(FreeBytes(fd.get())));
  }
  if (error != 0) return SystemError("posix_fallocate", name, error);
  return absl::OkStatus();
}

}  // namespace

std::string ShmRemedy(int error) {
  if (error == EMFILE || error == ENFILE) {
    return "; raise the limit of open files (ulimit -n, or fs.file-max)";
  }
  if (error == EACCES || error == EPERM || error == EROFS || error == ENOENT || error == ENOTDIR) {
    return absl::StrCat("; mount a tmpfs at ", kShmDirectory, " that user ", ::geteuid(),
                        " may read and write");
  }
  return "";
}

void SegmentName::Unlink() {
  if (name_.empty()) return;
  ::shm_unlink(name_.c_str());  // Gone already is as good.
  name_.clear();
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

absl::StatusOr<Mapping> Mapping::Map(const UniqueFd& fd, std::uint64_t bytes) {
  void* data =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (data == MAP_FAILED) {
    const std::string what =
        absl::StrCat("shared memory: mmap of ", bytes, " bytes failed: ", std::strerror(errno));
    if (errno == ENOMEM) return absl::ResourceExhaustedError(what);
    return absl::InternalError(what);
  }
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.bytes_ = bytes;
  return mapping;
}

absl::StatusOr<CreatedSegment> CreateSegment(const std::string& name, std::uint64_t bytes) {
  // shm_open sets close-on-exec, so no child keeps the lock of a dead parent.
  UniqueFd fd(::shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600));
  if (!fd.valid()) {
    if (errno == EEXIST) {
      return absl::AlreadyExistsError(absl::StrCat("shared memory: ", name, " exists"));
    }
    return SystemError("shm_open", name, errno);
  }
  CreatedSegment segment{SegmentName(name), std::move(fd)};
  while (::flock(segment.fd.get(), LOCK_EX) != 0) {
    if (errno != EINTR) return SystemError("flock", name, errno);
  }
  // Between shm_open and flock the segment looked like a dead owner's and may have been reclaimed.
  struct stat info;
  if (::fstat(segment.fd.get(), &info) != 0) return SystemError("fstat", name, errno);
  if (info.st_nlink == 0) {
    return absl::AlreadyExistsError(absl::StrCat("shared memory: ", name, " was reclaimed"));
  }
  EPS_RETURN_IF_ERROR(Reserve(segment.fd, name, bytes));
  return segment;
}

absl::StatusOr<UniqueFd> OpenSegment(const std::string& name, std::uint64_t bytes) {
  UniqueFd fd(::shm_open(name.c_str(), O_RDWR | O_NOFOLLOW, 0));
  if (!fd.valid()) {
    if (errno == ENOENT) {
      return absl::NotFoundError(
          absl::StrCat("shared memory: ", name, " is gone; its owner ended or sealed it"));
    }
    if (errno == EACCES) {
      return absl::PermissionDeniedError(
          absl::StrCat("shared memory: ", name, " may not be opened by this user"));
    }
    return SystemError("shm_open", name, errno);
  }
  struct stat info;
  if (::fstat(fd.get(), &info) != 0) return SystemError("fstat", name, errno);
  if (info.st_uid != ::geteuid()) {
    return absl::PermissionDeniedError(absl::StrCat("shared memory: ", name, " belongs to user ",
                                                    info.st_uid, ", not to this one, ",
                                                    ::geteuid()));
  }
  if (!S_ISREG(info.st_mode) || static_cast<std::uint64_t>(info.st_size) != bytes) {
    return absl::InvalidArgumentError(absl::StrCat("shared memory: ", name, " has ", info.st_size,
                                                   " bytes, not the ", bytes, " of its handle"));
  }
  return fd;
}

}  // namespace epserve::runtime
