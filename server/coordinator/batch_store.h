// What the host keeps of batches in flight: it cuts requests into shards, takes in the shards'
// output rows, and puts them together again. Rows go through the epoch's arena to the workers that
// have it mapped, and within the messages to the others. Rows in a client's shared memory are read
// there by the workers, and written there, where those can get its descriptors (directly); for the
// others the rows are copied here. Tensors in CUDA memory are the workers' alone.
//
// Thread safety: none; whoever has the host's turn.
// Invariants: a batch is kept from its start until Erase(); a shard's rows are taken once and only
// where their size is right.
#ifndef EPSERVE_SERVER_COORDINATOR_BATCH_STORE_H_
#define EPSERVE_SERVER_COORDINATOR_BATCH_STORE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "runtime/routing/count_matrix.h"
#include "runtime/symmetric/row_arena.h"
#include "server/common/probe.h"
#include "server/coordinator/front_door/validated_request.h"
#include "server/coordinator/region_use.h"
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
  std::vector<KeptPart> parts;       // in batch order
  std::int64_t direct_bytes = 0;     // in clients' regions, read and written by workers
  std::int64_t copied_bytes = 0;     // in clients' regions, read and written here
  std::int64_t device_bytes = 0;     // in clients' CUDA memory
  int slot = 0;
  std::shared_ptr<runtime::RowArena> arena;  // null where no rank's rows are in one
  WorkerTimes times;  // of each phase the most that any worker took; counts: or the matrix here
  std::vector<WorkerTimes> times_of_rank;
  CountExchange counts = CountExchange::kCoordinator;
  TimeUs started_us = 0;
  TimeUs last_done_us = 0;
  bool is_probe = false;
  server::ProbeBatch probe;  // where is_probe
};

class BatchStore {
 public:
  // `hidden` is H, `topk` K.
  BatchStore(runtime::Placement placement, std::int64_t hidden, int topk);

  // From now on batches of `epoch` may go through `arena`, which replaces that of older epochs.
  void OpenArena(EpochId epoch, std::shared_ptr<runtime::RowArena> arena);
  // This worker has the epoch's arena mapped. Of no effect where there is none.
  void UseArena(EpochId epoch, StreamId stream);
  // This worker, which has the arena mapped, can get the descriptors of clients' regions.
  void UseRegions(EpochId epoch, StreamId stream);
  // This worker, which has the arena mapped, takes its rows of any shard there.
  void UseSharedRows(EpochId epoch, StreamId stream);
  // Every worker that will ever use it has opened it.
  void SealArena(EpochId epoch);
  void CloseArena(EpochId epoch);

  // Keeps the batch; gives the shards, by rank. `requests` are those of `start`, in its order.
  std::vector<ShardMessage> Start(const StartBatch& start,
                                  std::span<const ValidatedRequest* const> requests, TimeUs now_us);
  std::vector<ShardMessage> Start(const StartProbe& start, TimeUs now_us);

  // The batch's part of a BatchDone with code OK. INTERNAL: wrong size, nothing taken. `rank`
  // receives the reporting rank, or -1 where the batch, or the stream's part in it, is unknown or
  // has reported before; then nothing is taken either. A fault is that of the request whose row it
  // names.
  absl::Status TakeOutput(const BatchDone& done, std::string output, const WorkerTimes& times,
                          TimeUs now_us, int* rank, std::span<const RegionFault> faults = {});
  // The batch's part of a BatchDone with another code.
  void TakeFailure(const BatchDone& done);

  // Brings the output of the part's request to its window, but for the rows that its workers have
  // written there, or, where it has none, to `out`. The part's fault, if it has one.
  static absl::Status Deliver(const KeptBatch& batch, const KeptPart& part, std::span<char> out);

  // Copies the batch's rows into `out`, which has their size. INTERNAL where a shard's rows are
  // missing or `out` has another size.
  static absl::Status CopyRows(const KeptBatch& batch, runtime::RowRange rows, std::span<char> out);

  KeptBatch* Find(EpochId epoch, BatchId batch);
  // The batch has ended on every rank.
  void Erase(EpochId epoch, BatchId batch);
  // The batch came to nothing; ranks that have not ended it, and whose stream is open, may still be
  // at it.
  void Drop(EpochId epoch, BatchId batch, const std::function<bool(StreamId)>& is_open);
  RegionUse& regions() { return regions_; }

 private:
  struct Segment;

  KeptBatch& Keep(EpochId epoch, BatchId id, int slot, const std::vector<ShardPlan>& plans,
                  TimeUs now_us);
  std::vector<ShardMessage> MakeShards(const ShardMessage& common, KeptBatch& batch,
                                       std::span<const Segment> segments);
  static void CutRows(std::span<const Segment> segments, std::size_t index, KeptBatch& batch,
                      ShardMessage& shard);
  // Tells all shards of each other's rows, where all of the batch are in the arena already.
  void ShareRows(const KeptBatch& batch, std::vector<ShardMessage>& shards) const;

  const runtime::Placement placement_;
  const std::int64_t hidden_;
  const int topk_;
  EpochId arena_epoch_ = 0;  // of arena_
  std::shared_ptr<runtime::RowArena> arena_;
  std::set<StreamId> arena_streams_;
  std::set<StreamId> sharing_streams_;  // of them, those that take others' rows there
  RegionUse regions_;
  std::map<std::pair<EpochId, BatchId>, KeptBatch> batches_;
};

// The bytes of one element.
std::int64_t RowTypeBytes(RowType type);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_BATCH_STORE_H_
