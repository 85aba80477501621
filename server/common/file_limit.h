// How many files a process may have open: the system's default is far below what a server needs.
// Thread-safe.
#ifndef EPSERVE_SERVER_COMMON_FILE_LIMIT_H_
#define EPSERVE_SERVER_COMMON_FILE_LIMIT_H_

#include <cstdint>

#include "absl/status/statusor.h"

namespace epserve::server {

// Raises this process's limit as far as it may by itself (to the hard limit); gives what holds now.
absl::StatusOr<std::uint64_t> RaiseFileLimit();

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_FILE_LIMIT_H_
