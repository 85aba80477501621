#include <climits>

#include "runtime/base/cuda_status.h"
#include "runtime/engine/cuda_routing.h"

namespace epserve::runtime {
namespace {

// One block, so that what all entries say is known to it without another launch: a decode batch has
// a thousand of them, and 4096 tokens of top-8 take a block some 30 us.
constexpr int kThreads = 1024;
constexpr int kEntriesAtOnce = 4;  // on their way at a time, over a link perhaps

template <typename T>
__device__ T LoadAt(const std::byte* tensor, std::int64_t index) {
  const std::byte* const at = tensor + index * static_cast<std::int64_t>(sizeof(T));
  if (reinterpret_cast<std::uintptr_t>(at) % sizeof(T) == 0) {
    return *reinterpret_cast<const volatile T*>(at);
  }
  T value;
  auto* const bytes = reinterpret_cast<std::byte*>(&value);
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    bytes[i] = *reinterpret_cast<const volatile std::byte*>(at + i);
  }
  return value;
}

__device__ std::int64_t LoadId(const RoutingArgs& args, std::int64_t index) {
  return args.wide_ids ? LoadAt<std::int64_t>(args.ids, index)
                       : LoadAt<std::int32_t>(args.ids, index);
}

__global__ void __launch_bounds__(kThreads)
    TakeRoutingKernel(const __grid_constant__ RoutingArgs args) {
  __shared__ int first_wrong_id;
  __shared__ int first_wrong_weight;
  if (threadIdx.x == 0) first_wrong_id = first_wrong_weight = INT_MAX;
  __syncthreads();
  int wrong_id_at = INT_MAX;  // this thread's first, and what it is
  int wrong_weight_at = INT_MAX;
  std::int64_t wrong_id = 0;
  float wrong_weight = 0.0f;
  const auto num_entries = static_cast<int>(args.num_entries);
  for (int start = static_cast<int>(threadIdx.x); start < num_entries;
       start += kEntriesAtOnce * kThreads) {
    std::int64_t ids[kEntriesAtOnce];
    float weights[kEntriesAtOnce];
#pragma unroll
    for (int u = 0; u < kEntriesAtOnce; ++u) {
      const int i = start + u * kThreads;
      if (i >= num_entries) break;
      ids[u] = LoadId(args, i);
      weights[u] = LoadAt<float>(args.weights, i);
    }
#pragma unroll
    for (int u = 0; u < kEntriesAtOnce; ++u) {
      const int i = start + u * kThreads;
      if (i >= num_entries) break;
      args.checked_ids[i] = static_cast<std::int32_t>(ids[u]);
      args.checked_weights[i] = weights[u];
      if ((ids[u] < -1 || ids[u] >= args.num_experts) && wrong_id_at == INT_MAX) {
        wrong_id_at = i;
        wrong_id = ids[u];
      }
      if (!isfinite(weights[u]) && wrong_weight_at == INT_MAX) {
        wrong_weight_at = i;
        wrong_weight = weights[u];
      }
    }
  }
  if (wrong_id_at != INT_MAX) atomicMin(&first_wrong_id, wrong_id_at);
  if (wrong_weight_at != INT_MAX) atomicMin(&first_wrong_weight, wrong_weight_at);
  __syncthreads();
  if (first_wrong_id == INT_MAX && first_wrong_weight == INT_MAX) {
    if (threadIdx.x == 0) args.report->kind = RoutingReport::kFine;
    return;
  }
  // Each thread clears what it has written itself.
  for (int i = static_cast<int>(threadIdx.x); i < num_entries; i += kThreads) {
    args.checked_ids[i] = -1;
    args.checked_weights[i] = 0.0f;
  }
  if (first_wrong_id != INT_MAX) {
    if (wrong_id_at != first_wrong_id) return;
    *args.report = {RoutingReport::kWrongId, 0.0f, wrong_id_at, wrong_id};
  } else if (wrong_weight_at == first_wrong_weight) {
    *args.report = {RoutingReport::kWrongWeight, wrong_weight, wrong_weight_at, 0};
  }
}

}  // namespace

absl::Status LoadRoutingKernel() { return LoadKernel(TakeRoutingKernel); }

absl::Status LaunchTakeRouting(const RoutingArgs& args, cudaStream_t stream) {
  TakeRoutingKernel<<<1, kThreads, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
