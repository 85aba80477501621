#include "runtime/symmetric/stale_heaps.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "runtime/base/unique_fd.h"
#include "runtime/symmetric/shm_segment.h"
#include "runtime/symmetric/symmetric_heap.h"

namespace epserve::runtime {
namespace {

bool TakeDigits(std::string_view* text, std::string_view digits) {
  const std::size_t count = std::min(text->find_first_not_of(digits), text->size());
  text->remove_prefix(count);
  return count > 0;
}

bool TakeDash(std::string_view* text) {
  if (!text->starts_with('-')) return false;
  text->remove_prefix(1);
  return true;
}

// epserve-<cluster_id>-<epoch>-<rank>-<nonce>, exactly: a cluster's id may hold dashes too, so a
// prefix alone could be another cluster's.
bool IsHeapOf(std::string_view file, const std::string& prefix) {
  if (!file.starts_with(prefix)) return false;
  file.remove_prefix(prefix.size());
  constexpr std::string_view kDecimal = "0123456789";
  return TakeDigits(&file, kDecimal) && TakeDash(&file) && TakeDigits(&file, kDecimal) &&
         TakeDash(&file) && file.size() == 16 && TakeDigits(&file, "0123456789abcdef") &&
         file.empty();
}

// True if the file was a dead owner's and is gone.
bool ReclaimIfStale(int directory_fd, const char* file) {
  const UniqueFd fd(::openat(directory_fd, file, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return false;  // Gone meanwhile, or another user's.
  struct stat info;
  if (::fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != ::geteuid()) {
    return false;
  }
  // The lock fails where the owner lives. Two reclaimers at once: one of them finds it gone.
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) return false;
  return ::unlinkat(directory_fd, file, 0) == 0;
}

}  // namespace

absl::StatusOr<int> ReclaimStaleHeaps(const std::string& cluster_id) {
  EPS_RETURN_IF_ERROR(ValidateClusterId(cluster_id));
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(kShmDirectory), &::closedir);
  if (directory == nullptr) {
    const int error = errno;
    return absl::InternalError(absl::StrCat("reclaim stale heaps: opendir of ", kShmDirectory,
                                            " failed: ", std::strerror(error), ShmRemedy(error)));
  }
  const std::string prefix = absl::StrCat("epserve-", cluster_id, "-");
  int reclaimed = 0;
  while (const dirent* entry = ::readdir(directory.get())) {
    if (!IsHeapOf(entry->d_name, prefix)) continue;
    if (ReclaimIfStale(::dirfd(directory.get()), entry->d_name)) ++reclaimed;
  }
  return reclaimed;
}

}  // namespace epserve::runtime
