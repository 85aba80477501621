// Routing that lies in device memory of other processes: copied from there and checked on the
// device, so that no host waits for it. Internal to this folder.
#ifndef EPSERVE_RUNTIME_ENGINE_CUDA_ROUTING_H_
#define EPSERVE_RUNTIME_ENGINE_CUDA_ROUTING_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"

namespace epserve::runtime {

// What is wrong with a piece's routing, its first wrong id before its first wrong weight.
struct RoutingReport {
  enum Kind : std::int32_t { kFine, kWrongId, kWrongWeight };
  std::int32_t kind;
  float weight;        // of kWrongWeight
  std::int64_t entry;  // among the piece's [T, K]
  std::int64_t id;     // of kWrongId
};

struct RoutingArgs {
  // Any alignment: a request's tensors lie where its sender has put them.
  const std::byte* ids;      // [T, K] i32, or i64 where `wide_ids`
  const std::byte* weights;  // [T, K] f32
  bool wide_ids;
  std::int64_t num_entries;  // T * K
  std::int64_t num_experts;
  std::int32_t* checked_ids;  // [T, K] out
  float* checked_weights;     // [T, K] out
  RoutingReport* report;      // memory of the host that the device can write, out
};

// Loads the kernel into the current device, so that no batch waits for that.
absl::Status LoadRoutingKernel();

// Copies ids and weights, each read once, and then checks the copies: ids must be in
// [-1, num_experts), weights finite. Where any is not, all of the piece's ids come out as -1 and
// its weights as 0, and the report says which. Enqueues on `stream` and returns before it runs.
absl::Status LaunchTakeRouting(const RoutingArgs& args, cudaStream_t stream);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ENGINE_CUDA_ROUTING_H_
