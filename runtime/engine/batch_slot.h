// One slot of the host engine: a shard from Stage to Finish, with every buffer it needs, sized at
// start. Used by one thread at a time. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_BATCH_SLOT_H_
#define EPSERVE_RUNTIME_ENGINE_BATCH_SLOT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/shard_intake.h"
#include "runtime/engine/shard_slot.h"
#include "runtime/experts/expert_ffn.h"

namespace epserve::runtime {

struct BatchSlotConfig {
  ShardIntake::Config intake;
  std::int64_t intermediate = 0;
  std::int64_t num_local_experts = 0;
  int compute_threads = 1;
};

class BatchSlot final : public ShardSlot {
 public:
  explicit BatchSlot(const BatchSlotConfig& config);
  // What a slot of `config` takes.
  static std::uint64_t PlanBytes(const BatchSlotConfig& config);

  // The rest of Stage: no row has been counted yet.
  void Reset();
  // Keeps a copy of `counts`, for as long as the exchange needs it.
  DispatchArgs MakeDispatchArgs(int slot, const CountMatrix& counts);
  void RunExperts(const LayerWeights& layer, const ReceivedRows& received);

  // Where Combine has left the shard's output.
  const std::byte* output() const { return output_; }
  void SetOutput(const std::byte* output) { output_ = output; }
  const std::vector<std::int64_t>& local_expert_rows() const { return local_expert_rows_; }

 private:
  CountMatrix counts_;
  const std::byte* output_ = nullptr;
  std::vector<std::int64_t> local_expert_rows_;  // [E_local]
  std::unique_ptr<ExpertFfn> ffn_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_BATCH_SLOT_H_
