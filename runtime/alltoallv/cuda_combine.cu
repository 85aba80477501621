// Combine: one launch with two roles. Push blocks take the weighted sum of each received row's
// local experts and write the one partial row to the row's source, with a flag a row. Reduce blocks
// add this rank's own tokens' partial rows as they come in, in ascending rank order, so that the
// reading of one row overlaps the link's carrying of the next. Push blocks come first in the grid
// and wait for nobody; reduce blocks wait only for other ranks' push blocks: no cycle, however
// blocks are scheduled.
#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpTeamThreads = 1024;
constexpr int kBlockTeamThreads = 256;

struct CombineShared {
  const uint4* source[kWarpSize][kMaxCudaTopk];  // [teams] rows to add
  float weight[kWarpSize][kMaxCudaTopk];
  int num_sources[kWarpSize];
};

// Adds the team's listed rows into `out`, in the order of the list. Two rows' pieces are on their
// way at a time, so that the latency of memory is paid once for both; `while_loading` runs once
// while the first are.
template <typename Element, RowTeam kTeam, typename WhileLoading>
__device__ void AddRows(const CombineShared& shared, std::int64_t num_vectors, uint4* out,
                        WhileLoading while_loading) {
  using T = Team<kTeam>;
  using V = Vector16<Element>;
  constexpr int kUnroll = kTeam == RowTeam::kWarp ? 2 : 4;
  const int num_sources = shared.num_sources[T::index()];
  bool first_loads = true;
  for (std::int64_t start = T::rank(); start < num_vectors; start += kUnroll * T::size()) {
    float sum[kUnroll][V::kElements] = {};
    for (int s = 0; s < num_sources; s += 2) {
      const uint4* first = shared.source[T::index()][s];
      const bool paired = s + 1 < num_sources;
      const uint4* second = shared.source[T::index()][paired ? s + 1 : s];
      uint4 a[kUnroll], b[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t v = start + u * T::size();
        // From L2: a peer may have written the row since this SM last saw the line.
        if (v < num_vectors) a[u] = __ldcg(first + v);
        if (v < num_vectors && paired) b[u] = __ldcg(second + v);
      }
      if (first_loads) {
        first_loads = false;
        while_loading();
      }
      const float first_weight = shared.weight[T::index()][s];
      const float second_weight = shared.weight[T::index()][paired ? s + 1 : s];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t v = start + u * T::size();
        if (v < num_vectors) V::MultiplyAdd(a[u], first_weight, sum[u]);
        if (v < num_vectors && paired) V::MultiplyAdd(b[u], second_weight, sum[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = start + u * T::size();
      if (v < num_vectors) out[v] = V::Pack(sum[u]);
    }
  }
  if (first_loads) while_loading();  // No row, or none of its pieces was this thread's.
}

// A received row: the j-th from `source`.
struct ReceivedRow {
  int source;
  std::int64_t j;
};

// Writes one row to its source and returns its flag, yet to be raised. Raises `flag_before`, the
// flag of the team's row before, while it waits for this one's pieces: a release waits until its
// stores have arrived, which takes as long.
template <typename Element, RowTeam kTeam>
__device__ std::uint64_t* PushRow(const CudaCombineArgs& args, const AreaUse& use,
                                  const ReceivedRow& received, std::int64_t num_vectors,
                                  std::uint64_t* flag_before, CombineShared* shared) {
  using T = Team<kTeam>;
  const AreaLayout& layout = args.area.layout;
  const std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const std::int64_t row = args.recv_base[received.source] + received.j;
  if (T::rank() < kWarpSize) {
    const int lane = T::rank();
    int index = -1;
    float weight = 0.0f;
    if (lane < args.topk) {
      index = args.expert_index[row * args.topk + lane];
      weight = reinterpret_cast<const float*>(own + layout.topk_weights)[row * args.topk + lane];
    }
    const unsigned present = __ballot_sync(0xffffffffu, index >= 0);
    if (index >= 0) {
      const int place = __popc(present & ((1u << lane) - 1u));
      shared->source[T::index()][place] =
          static_cast<const uint4*>(args.expert_rows) + index * num_vectors;
      shared->weight[T::index()][place] = weight;
    }
    if (lane == 0) shared->num_sources[T::index()] = __popc(present);
  }
  T::sync();
  std::byte* there = args.area.heap[received.source] + use.byte_offset;
  const std::int64_t partial = args.return_base[received.source] + received.j;
  AddRows<Element, kTeam>(*shared, num_vectors,
                          reinterpret_cast<uint4*>(there + layout.partials) + partial * num_vectors,
                          [&] {
                            if (flag_before != nullptr && T::rank() == 0)
                              PublishRow(flag_before, use.use);
                          });
  T::sync();  // Orders the team's stores before the release; frees the list.
  return reinterpret_cast<std::uint64_t*>(there + layout.row_flags) + partial;
}

template <typename Element, RowTeam kTeam>
__device__ void Push(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors,
                     CombineShared* shared) {
  using T = Team<kTeam>;
  const int num_ranks = args.area.num_ranks;
  const auto* counts = reinterpret_cast<const std::int32_t*>(
      args.area.heap[args.area.rank] + use.byte_offset + args.area.layout.counts);
  std::int64_t longest = 0;
  for (int r = 0; r < num_ranks; ++r) {
    const std::int64_t rows = args.recv_rows[r] >= 0 ? args.recv_rows[r] : __ldcg(counts + r);
    longest = rows > longest ? rows : longest;
  }
  const std::int64_t teams = static_cast<std::int64_t>(args.push_blocks) * T::count();
  std::uint64_t* flag = nullptr;  // of the team's last row
  // Sources take turns, this rank's own rows last of each turn, so that all links carry evenly.
  for (std::int64_t i = static_cast<std::int64_t>(T::index()) * args.push_blocks + blockIdx.x;
       i < longest * num_ranks; i += teams) {
    const int source = static_cast<int>((args.area.rank + 1 + i % num_ranks) % num_ranks);
    const std::int64_t rows =
        args.recv_rows[source] >= 0 ? args.recv_rows[source] : __ldcg(counts + source);
    const ReceivedRow received{source, i / num_ranks};
    if (received.j < rows) {
      flag = PushRow<Element, kTeam>(args, use, received, num_vectors, flag, shared);
    }
  }
  if (flag != nullptr && T::rank() == 0) PublishRow(flag, use.use);
}

template <typename Element, RowTeam kTeam>
__device__ void Reduce(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors,
                       int block, CombineShared* shared) {
  using T = Team<kTeam>;
  const AreaLayout& layout = args.area.layout;
  const int num_ranks = args.area.num_ranks;
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const std::int64_t teams = static_cast<std::int64_t>(args.reduce_blocks) * T::count();
  for (std::int64_t token = static_cast<std::int64_t>(T::index()) * args.reduce_blocks + block;
       token < args.num_tokens; token += teams) {
    if (T::rank() < kWarpSize) {
      const int lane = T::rank();
      const int position = lane < num_ranks ? args.send_position[token * num_ranks + lane] : -1;
      std::int64_t partial = 0;
      bool arrived = false;
      if (position >= 0) {
        partial = args.partial_base[lane] + position;
        arrived = WaitAtLeast(reinterpret_cast<std::uint64_t*>(own + layout.row_flags) + partial,
                              use.use, lane, WaitStage::kCombine, args.wait);
      }
      const unsigned present = __ballot_sync(0xffffffffu, arrived);
      if (arrived) {
        const int place = __popc(present & ((1u << lane) - 1u));
        shared->source[T::index()][place] =
            reinterpret_cast<const uint4*>(own + layout.partials) + partial * num_vectors;
        shared->weight[T::index()][place] = 1.0f;
      }
      if (lane == 0) shared->num_sources[T::index()] = __popc(present);
    }
    T::sync();
    AddRows<Element, kTeam>(*shared, num_vectors,
                            static_cast<uint4*>(args.out) + token * num_vectors, [] {});
    T::sync();
  }
}

template <typename Element, RowTeam kTeam>
__global__ void __launch_bounds__(kTeam == RowTeam::kWarp ? kWarpTeamThreads : kBlockTeamThreads)
    CombineKernel(const __grid_constant__ CudaCombineArgs args) {
  __shared__ CombineShared shared;
  const AreaUse use = CurrentUse(args.area, 1);
  const std::int64_t num_vectors = args.hidden / Vector16<Element>::kElements;
  // Where every block has both roles, all of its pushing comes first: it waits for nobody before.
  const int block = static_cast<int>(blockIdx.x);
  if (block < args.push_blocks) Push<Element, kTeam>(args, use, num_vectors, &shared);
  if (args.merged_roles) {
    __syncthreads();
    Reduce<Element, kTeam>(args, use, num_vectors, block, &shared);
  } else if (block >= args.push_blocks) {
    Reduce<Element, kTeam>(args, use, num_vectors, block - args.push_blocks, &shared);
  }
  AdvanceUse(args.area, 1);
}

template <typename Element>
cudaError_t Launch(const CudaCombineArgs& args, cudaStream_t stream) {
  const int blocks = args.merged_roles ? args.push_blocks : args.push_blocks + args.reduce_blocks;
  const bool few = args.num_tokens <= std::int64_t{8} * args.reduce_blocks;
  if (few) {
    CombineKernel<Element, RowTeam::kBlock><<<blocks, kBlockTeamThreads, 0, stream>>>(args);
  } else {
    CombineKernel<Element, RowTeam::kWarp><<<blocks, kWarpTeamThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

template <typename Element>
absl::Status LoadKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(CombineKernel<Element, RowTeam::kWarp>));
  return LoadKernel(CombineKernel<Element, RowTeam::kBlock>);
}

}  // namespace

absl::Status LoadCombineKernels() {
  EPS_RETURN_IF_ERROR(LoadKernels<__nv_bfloat16>());
  EPS_RETURN_IF_ERROR(LoadKernels<__half>());
  return LoadKernels<float>();
}

absl::Status LaunchCombine(const CudaCombineArgs& args, cudaStream_t stream) {
  if (args.push_blocks < 1 || args.reduce_blocks < 1) {
    return absl::InvalidArgumentError(absl::StrCat("combine: push_blocks ", args.push_blocks,
                                                   " and reduce_blocks ", args.reduce_blocks,
                                                   " must be at least 1"));
  }
  if (args.merged_roles && args.push_blocks != args.reduce_blocks) {
    return absl::InvalidArgumentError(absl::StrCat("combine: with merged roles push_blocks ",
                                                   args.push_blocks, " must equal reduce_blocks ",
                                                   args.reduce_blocks));
  }
  if (args.topk < 1 || args.topk > kMaxCudaTopk) {
    return absl::InvalidArgumentError(
        absl::StrCat("combine: topk ", args.topk, " outside [1, ", kMaxCudaTopk, "]"));
  }
  switch (args.dtype) {
    case DataType::kBf16:
      EPS_CUDA_RETURN_IF_ERROR(Launch<__nv_bfloat16>(args, stream));
      return absl::OkStatus();
    case DataType::kFp16:
      EPS_CUDA_RETURN_IF_ERROR(Launch<__half>(args, stream));
      return absl::OkStatus();
    case DataType::kFp32:
      EPS_CUDA_RETURN_IF_ERROR(Launch<float>(args, stream));
      return absl::OkStatus();
    default:
      return absl::InvalidArgumentError(absl::StrCat("combine: dtype ",
                                                     std::string(DataTypeName(args.dtype)),
                                                     " is not one of fp32, fp16, bf16"));
  }
}

}  // namespace epserve::runtime
