// What counts as a small shard, for the workers that run it and the coordinator that plans it.
#ifndef EPSERVE_SERVER_COMMON_SMALL_SHARD_H_
#define EPSERVE_SERVER_COMMON_SMALL_SHARD_H_

namespace epserve::server {

// Rows up to which a shard's phases take microseconds, about what it takes to wake another thread
// for it: a worker runs it in the thread that brings it, and a second such batch beside it would
// have to wake one.
inline constexpr int kSmallShardRows = 16;

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_COMMON_SMALL_SHARD_H_
