// Launchers of the one-sided kernels. Each enqueues on `stream` and returns before it runs; none
// allocates or synchronises. All pointers are device memory unless said. T tokens of this rank's
// shard, H hidden size, K experts a token, R ranks, N rows received.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_KERNELS_H_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "runtime/alltoallv/cuda_layout.h"
#include "runtime/base/dtype.h"

namespace epserve::runtime {

enum class WaitStage : std::uint32_t {
  kNone = 0,
  kDispatch = 1,
  kCombine = 2,
  kBarrier = 3,
  kCounts = 4,
};

// What a wait that gave up reports; in host memory that the device can write.
struct WaitReport {
  std::uint32_t stage;  // WaitStage; 0: nothing to report. Written last.
  std::int32_t peer;
  std::uint64_t waited_ns;
  std::uint32_t aborted;  // 1: the abort word was set; 0: the time ran out
};

// Bounds of every device wait.
struct WaitControl {
  const std::uint32_t* abort_word;  // host memory, non-zero: give up
  WaitReport* report;               // host memory
  std::int64_t timeout_ns;
  // Device memory, 0 at first: the wait that makes it 1 is the one that reports. Not in the report
  // itself, because a device's atomics reach host memory only where the bus carries them.
  std::uint32_t* report_claim;
};

// The peers' heaps as this device sees them, and one kind of area in them.
struct AreaView {
  std::byte* heap[kMaxCudaRanks];  // [R], by rank; heap[rank] is this rank's own
  std::int64_t area_offset;        // of the first area of this kind in every heap
  AreaLayout layout;
  int rank;
  int num_ranks;
  // Host-counted use of the area, from 1 (prefill); or, where device_sequence is set, counted on
  // the device so that a captured graph can be replayed: areas alternate, [0]: dispatches, [1]:
  // combines. 0: every heap is this device's own, for others to carry rows between; kernels raise
  // flags that nobody reads, and wait for nobody.
  std::uint64_t use;
  std::uint64_t* device_sequence;  // [4]: two counters, two tickets; zero at start
  // Up to so many tokens of this rank's go as lines, and their sums come back so; 0: none. At most
  // layout.line_capacity.
  std::int64_t max_line_tokens;
};

inline bool SendsLines(const AreaView& area, std::int64_t num_tokens) {
  return area.max_line_tokens > 0 && num_tokens <= area.max_line_tokens;
}

// Where the teams of a launch draw the rows that they work on (see cuda_row_turns.cuh).
struct RowTickets {
  unsigned long long* word;  // device memory, 0 at first; null: shares are fixed
  std::uint64_t launch;      // number of the launch among those that draw from the word, from 1
};

struct CudaDispatchArgs {
  AreaView area;
  RowTickets tickets;            // of many rows
  const void* x;                 // [T, H] dtype, 16-byte aligned
  const std::int32_t* topk_ids;  // [T, K] global expert id; -1 = none
  const float* topk_weights;     // [T, K]
  std::int32_t* send_position;   // [T, R] out: row's place among this rank's rows to r; -1 = none
  std::int64_t num_tokens;       // T
  std::int64_t hidden;           // H; H * element size is a multiple of 16, H of 128 for kFp8
  int topk;                      // K
  DataType dtype;                // of x
  RowPayload payload;
  std::int32_t first_expert[kMaxCudaRanks + 1];
  std::int32_t row_base[kMaxCudaRanks];   // this rank's first row in each peer's area
  std::int32_t row_limit[kMaxCudaRanks];  // rows it may write there
  int num_blocks;                         // the same on every rank, and at every use of the area
  WaitControl wait;
};

// Loads the kernels of this header into the current device. CUDA loads a kernel at its first launch
// otherwise, and that waits for the device: for ever, where a kernel is running that waits for a
// peer which shares the device, and long in the first batch in any case.
absl::Status LoadDispatchKernels();
absl::Status LoadCombineKernels();
absl::Status LoadBarrierKernel();
absl::Status LoadCountsKernel();
absl::Status LoadExpertLayoutKernels();

// Sends every token once to each rank that owns any of its experts, then waits for all sources.
// Rows for this rank itself stay in `x`; only their metadata is written.
absl::Status LaunchDispatch(const CudaDispatchArgs& args, cudaStream_t stream);

struct CudaCombineArgs {
  AreaView area;
  RowTickets tickets;                 // of many rows, of those pushed
  const void* expert_rows;            // [M, H] dtype, the experts' outputs
  const std::int32_t* expert_index;   // [row_capacity, K] row of expert_rows, -1 = none
  const std::int32_t* send_position;  // [T, R] from dispatch
  void* out;                          // [T, H] dtype, overwritten
  std::int64_t num_tokens;            // T
  std::int64_t hidden;
  int topk;
  DataType dtype;
  std::int32_t recv_base[kMaxCudaRanks];     // first row of each source in this rank's area
  std::int32_t recv_rows[kMaxCudaRanks];     // rows from each source; -1: as counted on the device
  std::int32_t return_base[kMaxCudaRanks];   // this rank's first partial row in each source's area
  std::int32_t partial_base[kMaxCudaRanks];  // each rank's first partial row in this rank's area
  int push_blocks;
  int reduce_blocks;
  bool merged_roles;  // the same blocks push, then reduce: shortest for few rows
  WaitControl wait;
};

// Takes the weighted sum of each peer's row over the local experts and sends it to the row's
// source; adds up, for each of this rank's tokens, its local experts' rows and then the peers'
// partial rows in ascending rank order, in fp32.
absl::Status LaunchCombine(const CudaCombineArgs& args, cudaStream_t stream);

// All ranks of the epoch meet. `use` counts up from 1.
absl::Status LaunchBarrier(std::byte* const* heaps, int rank, int num_ranks,
                           std::int64_t barrier_offset, std::uint64_t* device_use,
                           const WaitControl& wait, cudaStream_t stream);

// Memory of the host's that the count exchange's kernel reads from and writes to.
struct CountsMailbox {
  const std::int32_t* own;  // [R] rows to each rank, then [E] pairs: this rank's
  std::int32_t* matrix;     // [R, R] rows, then [E] pairs of all shards: out
  std::uint64_t* sequence;  // [R] batch that each source told of: out
  std::uint64_t* done;      // raised to the batch's number when all of it is there: out
};

struct CountsArgs {
  AreaView area;
  std::uint64_t batch;  // number of the batch in the epoch; the slot's grow from use to use
  std::int64_t num_experts;
  CountsMailbox mailbox;
  WaitControl wait;
};

// All ranks tell each other what they counted, through each other's heaps. A wait that gives up
// leaves `done` as it was.
absl::Status LaunchCounts(const CountsArgs& args, cudaStream_t stream);

struct ExpertLayoutArgs {
  AreaView area;
  std::int32_t recv_base[kMaxCudaRanks];
  std::int32_t recv_rows[kMaxCudaRanks];  // -1: as counted on the device
  int topk;
  int num_local_experts;
  std::int32_t* expert_index;        // [row_capacity, K] out: row in expert-major order, -1 = none
  std::int32_t* expert_offset;       // [E_local + 1] out: first row of each expert
  std::int32_t* host_expert_offset;  // the same in memory of the host, out; null: not wanted
  WaitControl wait;                  // of the dispatch before
};

// Orders the received rows by expert, then by source and token. Deterministic. No rows where the
// dispatch's wait has given up.
absl::Status LaunchExpertLayout(const ExpertLayoutArgs& args, cudaStream_t stream);

struct GatherArgs {
  AreaView area;
  std::int32_t recv_base[kMaxCudaRanks];
  std::int32_t recv_rows[kMaxCudaRanks];
  const void* x;  // this rank's own tokens, whose rows were not sent
  const std::int32_t* expert_index;
  void* expert_inputs;  // [M, H] out, dtype (fp8 rows come out as bf16)
  std::int64_t hidden;
  int topk;
  DataType dtype;
  RowPayload payload;
  int num_blocks;
  WaitControl wait;  // of the dispatch before
};

// Copies the received rows into expert-major order.
absl::Status LaunchGather(const GatherArgs& args, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_KERNELS_H_
