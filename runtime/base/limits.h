// Limits that flags and the runtime share.
#ifndef EPSERVE_RUNTIME_BASE_LIMITS_H_
#define EPSERVE_RUNTIME_BASE_LIMITS_H_

namespace epserve::runtime {

inline constexpr int kMaxSlots = 16;  // batches in flight

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_LIMITS_H_
