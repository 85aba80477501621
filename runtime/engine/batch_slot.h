// One slot of the host engine: a shard from Stage to Finish, with every buffer it needs, sized at
// start. Used by one thread at a time. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_BATCH_SLOT_H_
#define EPSERVE_RUNTIME_ENGINE_BATCH_SLOT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/checkpoint/checkpoint.h"
#include "runtime/engine/engine.h"
#include "runtime/experts/expert_ffn.h"
#include "runtime/routing/router.h"

namespace epserve::runtime {

// Experts a token may name, as HostExchange and the front door have it.
inline constexpr int kMaxTopk = 16;

struct BatchSlotConfig {
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
  std::int64_t num_experts = 0;
  std::int64_t num_local_experts = 0;
  std::int64_t max_batch_tokens = 0;
  std::int64_t max_shard_tokens = 0;
  RouterConfig router;
  bool has_router = false;
  int compute_threads = 1;
};

class BatchSlot {
 public:
  enum class State : std::uint8_t { kFree, kStaged, kDispatched, kComputed, kCombined, kFailed };
  static const char* StateName(State state);

  explicit BatchSlot(const BatchSlotConfig& config);
  // What a slot of `config` takes.
  static std::uint64_t PlanBytes(const BatchSlotConfig& config);

  State state() const { return state_; }
  void SetState(State state) { state_ = state; }
  void Release() { state_ = State::kFree; }

  // Checks the shard, and takes its routing in or makes it with `router` (null: there is none).
  absl::Status Stage(const ShardInput& input, std::size_t layer_index, const RouterWeights* router);
  // Keeps a copy of `counts`, for as long as the exchange needs it.
  DispatchArgs MakeDispatchArgs(int slot, const CountMatrix& counts);
  void RunExperts(const LayerWeights& layer, const ReceivedRows& received);

  std::span<const std::int32_t> topk_ids() const;
  int topk() const { return input_.topk; }
  std::size_t layer_index() const { return layer_index_; }
  void* output() { return output_.get(); }
  std::size_t output_bytes() const;
  BatchTimes& times() { return times_; }
  const std::vector<std::int64_t>& local_expert_rows() const { return local_expert_rows_; }

 private:
  absl::Status Validate(const ShardInput& input, bool has_router) const;
  void Route(const ShardInput& input, const RouterWeights& router);

  const BatchSlotConfig config_;
  State state_ = State::kFree;
  ShardInput input_;
  std::size_t layer_index_ = 0;
  CountMatrix counts_;
  BatchTimes times_;
  std::vector<std::int64_t> local_expert_rows_;  // [E_local]
  // Left uninitialised, so that they become resident only as far as batches use them.
  std::unique_ptr<std::int32_t[]> topk_ids_;  // [max shard, kMaxTopk]
  std::unique_ptr<float[]> topk_weights_;     // [max shard, kMaxTopk]
  std::unique_ptr<std::byte[]> output_;       // [max shard, H] of up to 4 bytes
  std::unique_ptr<float[]> routed_rows_;      // [kRoutedRows, H], with a router
  std::unique_ptr<float[]> router_scratch_;
  std::unique_ptr<ExpertFfn> ffn_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_BATCH_SLOT_H_
