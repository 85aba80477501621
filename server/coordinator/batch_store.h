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
#include "server/coordinator/front_door/validated_request.h"
#include "server/coordinator/kept_batch.h"
#include "server/coordinator/region_use.h"
#include "server/coordinator/row_blocks.h"
#include "server/coordinator/row_copier.h"
#include "server/coordinator/state_machine/commands.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

class BatchStore {
 public:
  // `hidden` is H, `topk` K.
  BatchStore(runtime::Placement placement, std::int64_t hidden, int topk);

  // From now on batches of `epoch` may go through the arena, which replaces that of older epochs;
  // null: there is none.
  void OpenArena(EpochId epoch, std::shared_ptr<RowBlocks> blocks);
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
  // Keeps a shard of the batch, which is to bring its counts, until these are known.
  void HoldBack(EpochId epoch, BatchId batch, const ShardPlan& plan, ShardMessage shard);
  // What was kept of the batch, once.
  std::vector<HeldShard> TakeHeldBack(EpochId epoch, BatchId batch);

  // The batch's part of a BatchDone with code OK. INTERNAL: wrong size, nothing taken. `rank`
  // receives the reporting rank, or -1 where the batch, or the stream's part in it, is unknown or
  // has reported before; then nothing is taken either. A fault is that of the request whose row it
  // names.
  absl::Status TakeOutput(const BatchDone& done, std::string output, const WorkerTimes& times,
                          TimeUs now_us, int* rank, std::span<const RegionFault> faults = {});
  // The batch's part of a BatchDone with another code.
  void TakeFailure(const BatchDone& done);

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
                  RowType row_type, TimeUs now_us);
  std::vector<ShardMessage> MakeShards(const ShardMessage& common, KeptBatch& batch,
                                       std::span<const Segment> segments);
  void CutRows(std::span<const Segment> segments, std::size_t index, KeptBatch& batch,
               ShardMessage& shard);
  // Tells all shards of each other's rows, where all of the batch are, or will be, in the arena.
  void ShareRows(const KeptBatch& batch, std::vector<ShardMessage>& shards) const;

  const runtime::Placement placement_;
  const std::int64_t hidden_;
  const int topk_;
  EpochId arena_epoch_ = 0;            // of blocks_
  std::shared_ptr<RowBlocks> blocks_;  // of the arena; null: there is none
  std::set<StreamId> arena_streams_;
  std::set<StreamId> sharing_streams_;  // of them, those that take others' rows there
  RegionUse regions_;
  RowCopier copier_{RowCopier::HelpersHere()};
  std::vector<RowCopier::Piece> copies_;  // of the batch that is being cut
  std::map<std::pair<EpochId, BatchId>, KeptBatch> batches_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_BATCH_STORE_H_
