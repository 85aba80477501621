// What the engines of all backends have in common: the checkpoint, the placement and its checks,
// the routers, and the walk of a shard's slot through its states. Internal to this folder.
// Thread safety: as Engine states.
#ifndef EPSERVE_RUNTIME_ENGINE_ENGINE_BASE_H_
#define EPSERVE_RUNTIME_ENGINE_ENGINE_BASE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/shard_intake.h"
#include "runtime/engine/shard_slot.h"

namespace epserve::runtime {

class EngineBase : public Engine {
 public:
  const ModelInfo& model() const final { return checkpoint_->info(); }
  absl::StatusOr<ShardCounts> Stage(const ShardInput& input) final;

 protected:
  EngineBase(const EngineOptions& options, std::unique_ptr<Checkpoint> checkpoint);

  // The slot's own part of Stage, once the shard has been taken in.
  virtual absl::Status StageSlot(ShardSlot& slot) = 0;
  // The slot [0, num_slots). REQUIRES: experts are loaded.
  virtual ShardSlot& SlotAt(int slot) = 0;

  absl::Status CheckPlacement(const Placement& placement, int rank) const;
  ExchangeConfig MakeExchangeConfig(const Placement& placement, int rank,
                                    std::uint64_t epoch) const;
  ShardIntake::Config MakeIntakeConfig(const Placement& placement) const;

  bool loaded() const { return rank_ >= 0; }
  int rank() const { return rank_; }
  const Placement& placement() const { return placement_; }
  // Nothing is loaded from here until SetLoaded.
  void SetUnloaded() { rank_ = -1; }
  void SetLoaded(const Placement& placement, int rank);
  // True where the experts of `rank` are those held already, and where its slots are, too.
  bool HoldsExperts(const Placement& placement, int rank) const;
  bool HoldsAll(const Placement& placement, int rank) const;

  // Reads the routers of every layer, unless they are there.
  absl::Status LoadRouters();
  absl::Status CheckLoaded(const char* operation) const;
  absl::StatusOr<std::size_t> LayerIndex(const char* operation, std::int64_t layer) const;
  // Where ReferenceExpert's arguments are right: the layer's index.
  absl::StatusOr<std::size_t> CheckReference(std::int64_t layer, std::int64_t expert,
                                             std::span<const float> x) const;
  // The slot in `wanted`; FAILED_PRECONDITION otherwise. `operation` opens the message.
  absl::StatusOr<ShardSlot*> SlotIn(const char* operation, int slot, ShardSlot::State wanted);

  const EngineOptions options_;
  const std::unique_ptr<Checkpoint> checkpoint_;

 private:
  absl::Status CheckDeviceRouting(const ShardInput& input) const;

  // Set by LoadExperts, read by batches.
  int rank_ = -1;  // -1: nothing is loaded
  Placement placement_;
  std::vector<RouterWeights> routers_;  // by layer index
};

// down(silu(gate(x)) * up(x)) by plain loops in fp64. gate, up [I, H]; down [H, I]; x [H].
std::vector<float> PlainExpert(const float* gate, const float* up, const float* down,
                               std::size_t hidden, std::size_t intermediate,
                               std::span<const float> x);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_ENGINE_BASE_H_
