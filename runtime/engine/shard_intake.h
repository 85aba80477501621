// The first step of a shard in every engine: checks it, and takes its routing in or makes it with
// the checkpoint's router. Holds the ids and weights until the next shard. Used by one thread at a
// time. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_SHARD_INTAKE_H_
#define EPSERVE_RUNTIME_ENGINE_SHARD_INTAKE_H_

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "runtime/base/limits.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/engine/engine.h"
#include "runtime/routing/router.h"

namespace epserve::runtime {

class ShardIntake {
 public:
  struct Config {
    std::int64_t hidden = 0;
    std::int64_t num_experts = 0;
    std::int64_t max_batch_tokens = 0;
    std::int64_t max_shard_tokens = 0;
    RouterConfig router;
    bool has_router = false;
  };

  explicit ShardIntake(const Config& config);
  static std::uint64_t PlanBytes(const Config& config);

  // INVALID_ARGUMENT: the shard does not fit the configuration, or needs a router and `router` is
  // null. Keeps a copy of `input`, whose rows stay the caller's.
  absl::Status Take(const ShardInput& input, const RouterWeights* router);

  const ShardInput& input() const { return input_; }
  const std::int32_t* topk_ids() const { return topk_ids_.get(); }   // [T, K]
  const float* topk_weights() const { return topk_weights_.get(); }  // [T, K]
  std::span<const std::int32_t> ids() const {
    return {topk_ids_.get(), static_cast<std::size_t>(input_.num_tokens * input_.topk)};
  }
  // The ids are of the shard's device_rows, and ids() is not for use.
  bool routed_on_device() const { return NumRoutedIn(input_.device_rows) > 0; }
  std::size_t row_bytes() const {
    return static_cast<std::size_t>(input_.num_tokens * config_.hidden) *
           DataTypeBytes(input_.dtype);
  }

 private:
  absl::Status Validate(const ShardInput& input, bool has_router) const;
  void Route(const ShardInput& input, const RouterWeights& router);

  const Config config_;
  ShardInput input_;
  // Left uninitialised, so that they become resident only as far as batches use them.
  std::unique_ptr<std::int32_t[]> topk_ids_;  // [max shard, kMaxTopk]
  std::unique_ptr<float[]> topk_weights_;     // [max shard, kMaxTopk]
  std::unique_ptr<float[]> routed_rows_;      // [kRoutedRows, H], with a router
  std::unique_ptr<float[]> router_scratch_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_SHARD_INTAKE_H_
