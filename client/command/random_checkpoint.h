// Writes a HuggingFace checkpoint directory of random experts and routers: config.json with the
// fields that the architecture's own configuration has, and one safetensors file or shards with an
// index. Attention, norms and embeddings are not in it, because nobody here reads them; of
// DeepSeek-V3 the shared experts are, as they stand in real checkpoints and must be passed over.
//
// Weights are uniform with variance 1 / (columns), so that inputs of unit variance give outputs of
// the same order. The same options give the same bytes.
#ifndef EPSERVE_CLIENT_COMMAND_RANDOM_CHECKPOINT_H_
#define EPSERVE_CLIENT_COMMAND_RANDOM_CHECKPOINT_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/command/interruption.h"
#include "client/command/options.h"

namespace epserve::client {

struct CheckpointSummary {
  std::uint64_t bytes = 0;  // of tensors
  std::int64_t num_tensors = 0;
  std::int64_t num_files = 0;
};

// `progress(written, total)` in bytes, after each tensor; may be null.
// INVALID_ARGUMENT: K exceeds E, one expert in deepseek_v3, fp8 for another architecture than that,
// more shards than tensors. FAILED_PRECONDITION: the directory is not empty and `force` is not set.
// With `force` the files of an older checkpoint, also of one half-written, are removed first.
// RESOURCE_EXHAUSTED: the disk is full. After an error, or a signal that `interruption` (may be
// null) takes, nothing is left of what this call wrote and created.
absl::StatusOr<CheckpointSummary> WriteRandomCheckpoint(
    const MakeCheckpointOptions& options,
    const std::function<void(std::uint64_t, std::uint64_t)>& progress,
    Interruption* interruption = nullptr);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_RANDOM_CHECKPOINT_H_
