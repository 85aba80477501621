// Whether a machine has cores to spare for threads that look for what comes instead of sleeping:
// a thread that sleeps for longer than a few hundred microseconds takes some 30 us to wake where
// cores have gone to sleep too, and one wake-up in a hundred 200 to 350 us (measured on a virtual
// machine of 64 cores: the host takes the idle core away). A request on GPUs passes ten threads
// that sleep meanwhile.
#ifndef EPSERVE_CLIENT_COMMAND_SPARE_CORES_H_
#define EPSERVE_CLIENT_COMMAND_SPARE_CORES_H_

#include <cstdint>
#include <string>

namespace epserve::client {

// How many cores this process may keep busy, at least 1: those that it may run on, and no more than
// its control groups grant. A quota that looking has used up would stop everything until its next
// period.
int AvailableCores();

// What the control groups that `membership` (as /proc/self/cgroup) names grant, below `root` (as
// /sys/fs/cgroup, of version 1 or 2); INT_MAX where they set no quota. Files that are not there or
// say something else set none.
int GrantedCores(const std::string& membership, const std::string& root);

// Threads of a service of so many workers that look where they are told to: of each worker the one
// that reads its stream and one a slot, and the coordinator's.
constexpr std::int64_t LookingThreads(std::int64_t num_workers, std::int64_t num_slots) {
  return num_workers * (num_slots + 1) + 1;
}

// How long each of so many threads looks before it sleeps, where nobody has said; 0: not at all,
// unless two of `cores` remain for all else.
constexpr std::int64_t DefaultBusyPollUs(int cores, std::int64_t num_threads) {
  // Several times what a batch of a few hundred tokens takes, so that a thread still looks when the
  // next one comes; an idle service stops looking at once.
  constexpr std::int64_t kLookUs = 2000;
  return cores >= num_threads + 2 ? kLookUs : 0;
}

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_SPARE_CORES_H_
