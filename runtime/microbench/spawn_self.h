// Another process of this program, by exec: what its threads and gRPC hold does not survive a fork.
#ifndef EPSERVE_RUNTIME_MICROBENCH_SPAWN_SELF_H_
#define EPSERVE_RUNTIME_MICROBENCH_SPAWN_SELF_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace epserve::runtime {

// The descriptor that a child finds what it was given as.
inline constexpr int kChildFd = 3;

// Starts this program with `args`, which its name precedes. `fd` becomes kChildFd there; -1:
// nothing does. INTERNAL: the system starts no process.
absl::StatusOr<pid_t> SpawnSelf(std::vector<std::string> args, int fd = -1);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_SPAWN_SELF_H_
