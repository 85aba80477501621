// What the processes of one measurement share: a block of anonymous memory, inherited as a file
// descriptor, with the parameters, a barrier, the heaps' handles and the time stamps.
// Thread safety: the flags and the barrier are made for it; every rank writes only its own entries,
// and others read them only after a barrier.
#ifndef EPSERVE_RUNTIME_MICROBENCH_COORDINATION_H_
#define EPSERVE_RUNTIME_MICROBENCH_COORDINATION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "runtime/base/dtype.h"
#include "runtime/base/unique_fd.h"
#include "runtime/routing/count_matrix.h"
#include "runtime/symmetric/shared_flag.h"
#include "runtime/symmetric/shm_segment.h"

namespace epserve::runtime {

enum class BenchBackend : std::uint8_t { kHost, kCuda, kNccl };

struct BenchParams {
  BenchBackend backend = BenchBackend::kHost;
  int num_ranks = 4;
  std::int64_t tokens_per_rank = 2048;
  std::int64_t hidden = 2048;
  int topk = 8;
  std::int64_t num_experts = 64;
  DataType dtype = DataType::kBf16;
  int iterations = 50;
  int warmup = 5;
  std::uint32_t seed = 1;
  std::int64_t peer_timeout_ms = 60'000;
  // Of the device backends alone.
  bool decode = false;          // the low-latency path, replayed from a graph; else prefill
  bool fp8 = false;             // rows are cast to fp8 on their way to the experts
  int comm_blocks = 24;         // of dispatch (prefill)
  int push_blocks = 0;          // of combine's push role (prefill); 0: divided by the shape
  int reduce_blocks = 0;        // of combine's reduce role (prefill); 0: likewise
  int line_tokens = 128;        // of a rank that travel as lines at most (decode)
  std::uint64_t owner_pid = 0;  // Of the launcher; names the cluster of heaps.
};

// The phases that are timed, each between two barriers.
// kCopy: the bytes of dispatch, plainly copied. kCombineCopy: the bytes of combine, where they
// differ. kPair: dispatch and combine back to back. The last two are measured on cuda alone.
enum class Phase { kCopy, kDispatch, kCombine, kCombineCopy, kPair };
inline constexpr int kNumPhases = 5;

// On the monotonic clock, which all processes share; on cuda from 0, a GPU's own duration.
struct TimeSpan {
  std::int64_t begin_ns = 0;
  std::int64_t end_ns = 0;
};

struct RankEntry {
  std::uint32_t handle_bytes = 0;
  char handle[512] = {};
  std::uint64_t dispatch_bytes = 0;  // of rows that it sends to others
  std::uint64_t combine_bytes = 0;   // of rows that come back to others from it
  std::uint64_t heap_bytes = 0;
  std::int64_t verified_tokens = 0;  // over the verified iterations
  double max_relative_error = 0.0;   // of any token's row
  char error[512] = {};              // empty: none
};

struct ControlBlock {
  BenchParams params;
  std::atomic<std::uint32_t> abort{0};  // Set by the launcher when a rank has ended too early.
  std::atomic<std::uint64_t> arrivals{0};
  SharedFlag barrier;  // How many barriers have been passed by all.
  RankEntry ranks[kMaxRanks];
  // TimeSpan [kNumPhases, iterations, num_ranks] follows.
};

// The mapped block; for the launcher and the ranks alike.
class Coordination {
 public:
  // Makes a new block. The descriptor is not inherited unless the launcher says so.
  static absl::StatusOr<Coordination> Create(const BenchParams& params);
  // Maps the one behind an inherited descriptor.
  static absl::StatusOr<Coordination> Open(UniqueFd fd);

  int fd() const { return fd_.get(); }
  ControlBlock& block() const { return *reinterpret_cast<ControlBlock*>(mapping_.data()); }
  const BenchParams& params() const { return block().params; }
  RankEntry& rank(int rank) const { return block().ranks[rank]; }
  TimeSpan& span(Phase phase, int iteration, int rank) const;

  // Waits for all ranks. `passed` counts this rank's barriers and is raised by one.
  absl::Status Barrier(std::uint64_t* passed) const;

 private:
  Coordination(UniqueFd fd, Mapping mapping) : fd_(std::move(fd)), mapping_(std::move(mapping)) {}

  UniqueFd fd_;
  Mapping mapping_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_COORDINATION_H_
