#include "server/common/file_limit.h"

#include <sys/resource.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace epserve::server {

absl::StatusOr<std::uint64_t> RaiseFileLimit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limit.rlim_cur = limit.rlim_max;
    if (::setrlimit(RLIMIT_NOFILE, &limit) == 0) return limit.rlim_cur;
  }
  return absl::InternalError(
      absl::StrCat("file limit: it cannot be raised (", std::strerror(errno), ")"));
}

}  // namespace epserve::server
