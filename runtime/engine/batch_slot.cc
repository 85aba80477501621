#include "runtime/engine/batch_slot.h"

#include <algorithm>

#include "runtime/base/limits.h"

namespace epserve::runtime {
namespace {

ExpertFfn::Config FfnConfig(const BatchSlotConfig& config) {
  return {.hidden = config.intake.hidden,
          .intermediate = config.intermediate,
          .max_rows = config.intake.max_batch_tokens,
          .max_local_experts = config.num_local_experts,
          .max_topk = kMaxTopk,
          .threads = config.compute_threads};
}

// Bytes of a slot's own buffers, the expert workspace apart.
std::uint64_t BufferBytes(const BatchSlotConfig& config) {
  return static_cast<std::uint64_t>(config.num_local_experts * 8) +
         ShardIntake::PlanBytes(config.intake);
}

}  // namespace

BatchSlot::BatchSlot(const BatchSlotConfig& config)
    : ShardSlot(config.intake),
      local_expert_rows_(static_cast<std::size_t>(config.num_local_experts)),
      ffn_(ExpertFfn::Create(FfnConfig(config))) {}

std::uint64_t BatchSlot::PlanBytes(const BatchSlotConfig& config) {
  ExpertFfn::Config ffn = FfnConfig(config);
  ffn.threads = 1;  // Asked for its size alone; memory that is not touched is not resident.
  return ExpertFfn::Create(ffn)->workspace_bytes() + BufferBytes(config);
}

void BatchSlot::Reset() { std::fill(local_expert_rows_.begin(), local_expert_rows_.end(), 0); }

DispatchArgs BatchSlot::MakeDispatchArgs(int slot, const CountMatrix& counts) {
  counts_ = counts;
  DispatchArgs args;
  args.slot = slot;
  const ShardInput& input = intake().input();
  args.sequence = input.sequence;
  args.dtype = input.dtype;
  args.x = input.hidden;
  args.topk_ids = intake().topk_ids();
  args.topk_weights = intake().topk_weights();
  args.num_tokens = input.num_tokens;
  args.topk = input.topk;
  args.counts = &counts_;
  args.shared = input.shared;
  return args;
}

void BatchSlot::RunExperts(const LayerWeights& layer, const ReceivedRows& received) {
  ffn_->Run(layer, received, local_expert_rows_);
}

}  // namespace epserve::runtime
