// A batch in flight as the host keeps it: whose rows are in it, what each rank has to do with it,
// and how its output is put together again for the requests.
//
// Thread safety: none; whoever has the host's turn. Rows that were lent are their callers'.
#ifndef EPSERVE_SERVER_COORDINATOR_KEPT_BATCH_H_
#define EPSERVE_SERVER_COORDINATOR_KEPT_BATCH_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/common/probe.h"
#include "server/coordinator/front_door/validated_request.h"
#include "server/coordinator/row_blocks.h"
#include "server/coordinator/state_machine/commands.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

// One request's part in a batch.
struct KeptPart {
  RequestId request = 0;
  runtime::RowRange rows;
  RegionWindow source;  // of the hidden states, where they lie in a region
  RegionWindow output;  // where it goes to one
  RegionWindow ids;     // where they lie in CUDA memory, as the weights
  RegionWindow weights;
  bool wide_ids = false;
  absl::Status fault;  // not OK: some of its rows could not be read or written
};

struct HeldShard {
  ShardPlan plan;
  ShardMessage message;
};

struct KeptBatch {
  std::int64_t layer = 0;
  std::int64_t row_bytes = 0;  // H * size of the row type
  std::vector<ShardPlan> shards;
  std::vector<std::string> outputs;  // by rank; empty until taken, and where the arena has them
  std::vector<bool> taken;           // by rank
  std::vector<bool> ended;           // by rank: nothing of it touches a client's region any more
  std::vector<bool> in_arena;        // by rank
  std::vector<bool> direct;          // by rank: reads and writes clients' system regions itself
  std::vector<bool> on_device;       // by rank: reads or writes clients' CUDA memory
  std::vector<bool> answers_rows;    // by rank: its output comes in a message
  std::vector<HeldShard> held_back;  // not sent yet, since they are to bring the counts
  std::vector<KeptPart> parts;       // in batch order
  std::int64_t direct_bytes = 0;     // in clients' regions, read and written by workers
  std::int64_t copied_bytes = 0;     // in clients' regions, read and written here
  std::int64_t device_bytes = 0;     // in clients' CUDA memory
  int slot = 0;
  std::shared_ptr<RowBlocks::Held> blocks;  // of the arena; null where no rank's rows are there
  WorkerTimes times;  // of each phase the most that any worker took; counts: or the matrix here
  std::vector<WorkerTimes> times_of_rank;
  CountExchange counts = CountExchange::kCoordinator;
  TimeUs started_us = 0;
  TimeUs last_done_us = 0;
  bool is_probe = false;
  server::ProbeBatch probe;  // where is_probe
};

// The bytes of one element.
std::int64_t RowTypeBytes(RowType type);

// Brings the output of the part's request to its window, but for the rows that its workers have
// written there, or, where it has none, to `out`. The part's fault, if it has one.
absl::Status DeliverOutput(const KeptBatch& batch, const KeptPart& part, std::span<char> out);

// In place of that, where copying the rows would take long: the rows where they are, as they stay
// until `owner` has gone. Nothing where they are few, or not all in the arena, or not to be had
// there, or where the part has a fault or a window.
struct LentRows {
  std::span<const char> rows;
  std::shared_ptr<const void> owner;
};
std::optional<LentRows> LendOutput(const KeptBatch& batch, const KeptPart& part);

// Copies the batch's output rows into `out`, which has their size. INTERNAL where a shard's rows
// are missing or `out` has another size.
absl::Status CopyOutput(const KeptBatch& batch, runtime::RowRange rows, std::span<char> out);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_KEPT_BATCH_H_
