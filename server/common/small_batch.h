// What counts as a small batch, for the workers that run it and the coordinator that plans it.
#ifndef EPSERVE_SERVER_COMMON_SMALL_BATCH_H_
#define EPSERVE_SERVER_COMMON_SMALL_BATCH_H_

namespace epserve::server {

// Rows up to which a rank's phases take microseconds, about what it takes to wake another thread
// for it: a worker runs such a batch in the thread that brings it, and a second one beside it would
// have to wake one. A batch of so many tokens gives no rank more.
inline constexpr int kSmallBatchRows = 64;

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_SMALL_BATCH_H_
