#include "runtime/engine/shard_slot.h"

#include "runtime/base/status.h"

namespace epserve::runtime {

const char* ShardSlot::StateName(State state) {
  switch (state) {
    case State::kFree:
      return "free";
    case State::kStaged:
      return "staged";
    case State::kDispatched:
      return "dispatched";
    case State::kComputed:
      return "computed";
    case State::kCombined:
      return "combined";
    case State::kFailed:
      return "failed";
  }
  return "unknown";
}

absl::Status ShardSlot::TakeIn(const ShardInput& input, std::size_t layer_index,
                               const RouterWeights* router) {
  EPS_RETURN_IF_ERROR(intake_.Take(input, router));
  layer_index_ = layer_index;
  times_ = {};
  state_ = State::kStaged;
  return absl::OkStatus();
}

}  // namespace epserve::runtime
