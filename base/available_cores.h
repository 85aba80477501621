// How many cores this process may keep busy: what whoever starts threads asks, in place of how many
// the machine has. A container on a large node is often granted two.
#ifndef EPSERVE_BASE_AVAILABLE_CORES_H_
#define EPSERVE_BASE_AVAILABLE_CORES_H_

#include <string>

namespace epserve {

// At least 1: those that this process may run on, and no more than its control groups grant. Where
// threads have used up such a quota, all of the process stands still until its next period.
int AvailableCores();

// What the control groups that `membership` (as /proc/self/cgroup) names grant, below `root` (as
// /sys/fs/cgroup, of version 1 or 2); INT_MAX where they set no quota. Files that are not there or
// say something else set none.
int GrantedCores(const std::string& membership, const std::string& root);

}  // namespace epserve

#endif  // EPSERVE_BASE_AVAILABLE_CORES_H_
