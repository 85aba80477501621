// Limits that flags and the runtime share.
#ifndef EPSERVE_RUNTIME_BASE_LIMITS_H_
#define EPSERVE_RUNTIME_BASE_LIMITS_H_

namespace epserve::runtime {

inline constexpr int kMaxSlots = 16;  // batches in flight
inline constexpr int kMaxTopk = 16;   // experts of a token, K, that a model or a request may have

// Stands where a rank does in the names and handles of what the coordinator shares; no worker has
// it.
inline constexpr int kCoordinatorRank = 1'000'000;

// Longest that a wait may look before it sleeps: beyond what a small batch waits for, and short
// enough that an idle service falls asleep.
inline constexpr int kMaxBusyPollUs = 10'000;

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_LIMITS_H_
