// Which process of which machine this is, so that another process can watch for its end.
//
// A process id alone names different processes in different containers, and another one once it is
// used again: so the machine's boot, the namespace of the id and the time of the start go with it.
//
// Thread-safe: nothing is kept.
#ifndef EPSERVE_SERVER_COMMON_PROCESS_IDENTITY_H_
#define EPSERVE_SERVER_COMMON_PROCESS_IDENTITY_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/base/unique_fd.h"

namespace epserve::server {

struct ProcessIdentity {
  std::string home;  // the boot of the machine and the pid namespace; empty: not known
  std::int64_t pid = 0;
  std::uint64_t start_ticks = 0;  // when it started, in clock ticks since boot
};

// Of this process. `home` is empty where /proc does not tell.
ProcessIdentity OwnProcessIdentity();

// A descriptor that becomes readable when that process has ended: all its threads are gone, its
// memory is unmapped and its descriptors are closed. NOT_FOUND: no process of this machine and
// namespace is known to be it, whether it has ended or never was here.
absl::StatusOr<runtime::UniqueFd> OpenProcess(const ProcessIdentity& identity);

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_PROCESS_IDENTITY_H_
