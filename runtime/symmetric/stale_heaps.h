// Removes what crashed workers left in shared memory.
//
// A living owner holds a lock on its segment (flock), which the kernel drops when the process ends,
// however it ends. A heap segment that nobody locks is a dead owner's.
// Thread safety: safe from any thread and from several processes at once.
#ifndef EPSERVE_RUNTIME_SYMMETRIC_STALE_HEAPS_H_
#define EPSERVE_RUNTIME_SYMMETRIC_STALE_HEAPS_H_

#include <string>

#include "absl/status/statusor.h"

namespace epserve::runtime {

// Unlinks this user's heap segments of `cluster_id` whose owner is dead; never a living one's, and
// nothing else. Returns how many. INVALID_ARGUMENT: cluster_id.
absl::StatusOr<int> ReclaimStaleHeaps(const std::string& cluster_id);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_SYMMETRIC_STALE_HEAPS_H_
