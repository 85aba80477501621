// What a slot of every engine has: its state from Stage to Finish, the shard taken in, the times.
// Used by one thread at a time. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_SHARD_SLOT_H_
#define EPSERVE_RUNTIME_ENGINE_SHARD_SLOT_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/shard_intake.h"

namespace epserve::runtime {

class ShardSlot {
 public:
  enum class State : std::uint8_t { kFree, kStaged, kDispatched, kComputed, kCombined, kFailed };
  static const char* StateName(State state);

  explicit ShardSlot(const ShardIntake::Config& intake) : intake_(intake) {}

  State state() const { return state_; }
  void SetState(State state) { state_ = state; }
  void Release() { state_ = State::kFree; }

  // Checks the shard, and takes its routing in or makes it with `router` (null: there is none).
  absl::Status TakeIn(const ShardInput& input, std::size_t layer_index,
                      const RouterWeights* router);

  const ShardIntake& intake() const { return intake_; }
  std::size_t layer_index() const { return layer_index_; }
  BatchTimes& times() { return times_; }

  // Of the shard, counted once it was taken in.
  const ShardCounts& counts() const { return counts_; }
  void SetCounts(const ShardCounts& counts) { counts_ = counts; }

 private:
  ShardIntake intake_;
  State state_ = State::kFree;
  std::size_t layer_index_ = 0;
  BatchTimes times_;
  ShardCounts counts_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_SHARD_SLOT_H_
