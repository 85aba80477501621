// Combine: one launch with two roles. Pushing takes the weighted sum of each received row's local
// experts and writes the one partial row to the row's source, with a flag a row. Reducing adds this
// rank's own tokens' partial rows as they come in, in ascending rank order, so that the reading of
// one row overlaps the link's carrying of the next.
//
// Many rows: push blocks and reduce blocks, whose warps each run a pipe of rows. Push blocks come
// first in the grid and wait for nobody; reduce blocks wait only for other ranks' push blocks: no
// cycle, however blocks are scheduled. Few rows, whose latency counts: a block works on each, and
// every block pushes and then reduces; all blocks are resident at once.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/cuda_row_pipe.cuh"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kWarpSize = 32;
constexpr int kPipeThreads = kPipeWarps * kWarpSize;
// A row of 7168 bf16 is two vectors a thread, so that one trip to memory fetches whole rows.
constexpr int kBlockTeamThreads = 512;

// One team's walk over the rows that this rank has received, in the order they are pushed in, with
// the next row's list on its way: lane k holds where in expert_rows its k-th expert's output is.
// The team's i-th row of all is row i / R of one source; sources take turns, this rank's own rows
// last of each turn, so that all links carry evenly, and every team serves all sources.
class ReceivedRows {
 public:
  // Called by whole warps, of one team each.
  __device__ ReceivedRows(const CudaCombineArgs& args, const AreaUse& use, int first, int teams)
      : args_(args),
        own_(args.area.heap[args.area.rank] + use.byte_offset),
        i_(first),
        teams_(teams),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    const auto* counts = reinterpret_cast<const std::int32_t*>(own_ + args.area.layout.counts);
    if (lane_ < args.area.num_ranks) {
      // From L2: written by a peer.
      rows_ = args.recv_rows[lane_] >= 0 ? args.recv_rows[lane_] : __ldcg(counts + lane_);
    }
    LoadList();  // Before the counts have come; a row past its source's last is not looked at.
    longest_ = __reduce_max_sync(0xffffffffu, rows_);
    SkipMissing();
  }

  __device__ bool AtEnd() const { return i_ >= longest_ * args_.area.num_ranks; }
  __device__ int source() const { return source_; }
  __device__ int j() const { return i_ / args_.area.num_ranks; }
  // Row of expert_rows of the lane's expert, -1: none here.
  __device__ int index() const { return index_; }
  __device__ float weight() const { return weight_; }

  __device__ void Advance() {
    i_ += teams_;
    LoadList();
    SkipMissing();
  }

 private:
  __device__ void LoadList() {
    const int num_ranks = args_.area.num_ranks;
    const int turn = teams_ % num_ranks == 0 ? i_ / teams_ : 0;
    source_ = (args_.area.rank + 1 + i_ + turn) % num_ranks;
    const std::int64_t row = std::int64_t{args_.recv_base[source_]} + j();
    index_ = -1;
    if (lane_ >= args_.topk || row >= args_.area.layout.row_capacity) return;
    index_ = args_.expert_index[row * args_.topk + lane_];
    weight_ = reinterpret_cast<const float*>(
        own_ + args_.area.layout.topk_weights)[row * args_.topk + lane_];
  }

  __device__ void SkipMissing() {
    while (!AtEnd() && j() >= __shfl_sync(0xffffffffu, rows_, source_)) {
      i_ += teams_;
      LoadList();
    }
  }

  const CudaCombineArgs& args_;
  const std::byte* own_;
  int i_;
  int teams_;
  int longest_ = 0;
  int lane_;
  int rows_ = 0;  // from the rank of the lane's number
  int source_ = 0;
  int index_ = -1;
  float weight_ = 0.0f;
};

// Lists the present lanes' sources in the row, in the lanes' order.
__device__ void ListSources(bool present, const uint4* source, float weight, PipeRow* row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const unsigned all = __ballot_sync(0xffffffffu, present);
  if (present) {
    const int place = __popc(all & ((1u << lane) - 1u));
    row->source[place] = source;
    row->weight[place] = weight;
  }
  if (lane == 0) row->num_sources = __popc(all);
}

// The list of a received row's sum, and where it goes.
__device__ void ListReceived(const CudaCombineArgs& args, const AreaUse& use,
                             const ReceivedRows& rows, std::int64_t num_vectors, PipeRow* row) {
  ListSources(rows.index() >= 0,
              static_cast<const uint4*>(args.expert_rows) + rows.index() * num_vectors,
              rows.weight(), row);
  if (threadIdx.x % kWarpSize != 0) return;
  std::byte* there = args.area.heap[rows.source()] + use.byte_offset;
  const std::int64_t partial = args.return_base[rows.source()] + rows.j();
  row->out = reinterpret_cast<uint4*>(there + args.area.layout.partials) + partial * num_vectors;
  row->flag = reinterpret_cast<std::uint64_t*>(there + args.area.layout.row_flags) + partial;
}

// One team's walk over this rank's own tokens: lane r holds the place of rank r's partial row.
class OwnTokens {
 public:
  __device__ OwnTokens(const CudaCombineArgs& args, const AreaUse& use, std::int64_t first,
                       std::int64_t teams)
      : args_(args),
        use_(use.use),
        own_(args.area.heap[args.area.rank] + use.byte_offset),
        token_(first),
        teams_(teams),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {
    LoadPlace();
  }

  __device__ bool AtEnd() const { return token_ >= args_.num_tokens; }
  __device__ void Advance() {
    token_ += teams_;
    LoadPlace();
  }

  // True, to the whole warp, where all of the token's partial rows have arrived.
  __device__ bool HaveArrived() const {
    // acquire, system: as in WaitAtLeast. Pairs with PublishRow.
    const bool missing =
        position_ >= 0 && cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*Flag()).load(
                              cuda::memory_order_acquire) < use_;
    return !__any_sync(0xffffffffu, missing);
  }

  // Waits for the token's partial rows and lists them; one whose wait gave up is left out.
  __device__ void List(std::int64_t num_vectors, PipeRow* row) const {
    const bool arrived =
        position_ >= 0 && WaitAtLeast(Flag(), use_, lane_, WaitStage::kCombine, args_.wait);
    const auto* partials = reinterpret_cast<const uint4*>(own_ + args_.area.layout.partials);
    ListSources(arrived, partials + Partial() * num_vectors, 1.0f, row);
    if (lane_ != 0) return;
    row->out = static_cast<uint4*>(args_.out) + token_ * num_vectors;
    row->flag = nullptr;
  }

 private:
  __device__ void LoadPlace() {
    const bool has_place = lane_ < args_.area.num_ranks && token_ < args_.num_tokens;
    position_ = has_place ? args_.send_position[token_ * args_.area.num_ranks + lane_] : -1;
  }
  __device__ std::int64_t Partial() const {
    return position_ >= 0 ? args_.partial_base[lane_] + position_ : 0;
  }
  __device__ std::uint64_t* Flag() const {
    return reinterpret_cast<std::uint64_t*>(own_ + args_.area.layout.row_flags) + Partial();
  }

  const CudaCombineArgs& args_;
  std::uint64_t use_;
  std::byte* own_;
  std::int64_t token_;
  std::int64_t teams_;
  int lane_;
  int position_ = -1;
};

struct PushPipe {
  const CudaCombineArgs& args;
  const AreaUse& use;
  std::int64_t num_vectors;
  ReceivedRows rows;

  __device__ PipeNext Next(PipeRow* row, bool /*wait*/) {
    if (rows.AtEnd()) return PipeNext::kEnd;
    ListReceived(args, use, rows, num_vectors, row);
    rows.Advance();
    __syncwarp();
    return PipeNext::kRow;
  }
};

struct ReducePipe {
  std::int64_t num_vectors;
  OwnTokens tokens;

  __device__ PipeNext Next(PipeRow* row, bool wait) {
    if (tokens.AtEnd()) return PipeNext::kEnd;
    if (!wait && !tokens.HaveArrived()) return PipeNext::kNotYet;
    tokens.List(num_vectors, row);
    // The rows were written and acquired as ordinary memory; the copy engine reads them.
    asm volatile("fence.proxy.async;" ::: "memory");
    tokens.Advance();
    __syncwarp();
    return PipeNext::kRow;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kPipeThreads, 1)
    PipedCombineKernel(const __grid_constant__ CudaCombineArgs args) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto* shared = reinterpret_cast<PipeShared*>(shared_bytes);
  const AreaUse use = BeginUse(args.area, 1);
  const std::int64_t num_vectors = args.hidden / Vector16<Element>::kElements;
  const int block = static_cast<int>(blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (block < args.push_blocks) {
    PushPipe pipe{
        args, use, num_vectors,
        ReceivedRows(args, use, block * kPipeWarps + warp, args.push_blocks * kPipeWarps)};
    RunPipe<Element>(&pipe, static_cast<int>(num_vectors), use.use, shared);
  } else {
    const std::int64_t teams = std::int64_t{args.reduce_blocks} * kPipeWarps;
    ReducePipe pipe{
        num_vectors,
        OwnTokens(args, use, std::int64_t{block - args.push_blocks} * kPipeWarps + warp, teams)};
    RunPipe<Element>(&pipe, static_cast<int>(num_vectors), use.use, shared);
  }
}

// Adds the listed rows by the whole block, in the order of the list. Several rows' pieces are on
// their way at a time, so that the latency of memory is paid once for all; `while_loading` runs
// once while the first are.
template <typename Element, typename WhileLoading>
__device__ void AddRows(const PipeRow& row, std::int64_t num_vectors, WhileLoading while_loading) {
  using V = Vector16<Element>;
  constexpr int kUnroll = 2;
  constexpr int kRowsAtOnce = 3;
  bool first_loads = true;
  for (std::int64_t start = threadIdx.x; start < num_vectors; start += kUnroll * blockDim.x) {
    float sum[kUnroll][V::kElements] = {};
    for (int s = 0; s < row.num_sources; s += kRowsAtOnce) {
      uint4 piece[kRowsAtOnce][kUnroll];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (s + i >= row.num_sources) break;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const std::int64_t v = start + u * blockDim.x;
          // From L2: a peer may have written the row since this SM last saw the line.
          if (v < num_vectors) piece[i][u] = __ldcg(row.source[s + i] + v);
        }
      }
      if (first_loads) {
        first_loads = false;
        while_loading();
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (s + i >= row.num_sources) break;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (start + u * blockDim.x < num_vectors) {
            V::MultiplyAdd(piece[i][u], row.weight[s + i], sum[u]);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t v = start + u * blockDim.x;
      if (v < num_vectors) row.out[v] = V::Pack(sum[u]);
    }
  }
  if (first_loads) while_loading();  // No row, or none of its pieces was this thread's.
}

template <typename Element>
__global__ void __launch_bounds__(kBlockTeamThreads, 2)
    BlockCombineKernel(const __grid_constant__ CudaCombineArgs args) {
  __shared__ PipeRow row;
  const AreaUse use = BeginUse(args.area, 1);
  const std::int64_t num_vectors = args.hidden / Vector16<Element>::kElements;
  const bool lists = threadIdx.x < kWarpSize;
  ReceivedRows rows(args, use, blockIdx.x, gridDim.x);
  OwnTokens tokens(args, use, blockIdx.x, gridDim.x);  // Their places come while rows are pushed.
  std::uint64_t* written_flag = nullptr;               // of the block's row before; thread 0's
  // All of the pushing comes first: it waits for nobody.
  for (; !rows.AtEnd(); rows.Advance()) {
    if (lists) ListReceived(args, use, rows, num_vectors, &row);
    __syncthreads();
    // The flag of the row before is raised while this one's pieces are on their way: a release
    // waits until its stores have arrived, which takes as long.
    AddRows<Element>(row, num_vectors, [&] {
      if (threadIdx.x == 0 && written_flag != nullptr) PublishRow(written_flag, use.use);
    });
    if (threadIdx.x == 0) written_flag = row.flag;
    __syncthreads();  // Orders the block's stores before the release; frees the list.
  }
  if (threadIdx.x == 0 && written_flag != nullptr) PublishRow(written_flag, use.use);
  for (; !tokens.AtEnd(); tokens.Advance()) {
    if (lists) tokens.List(num_vectors, &row);
    __syncthreads();
    AddRows<Element>(row, num_vectors, [] {});
    __syncthreads();
  }
}

template <typename Element>
cudaError_t Launch(const CudaCombineArgs& args, cudaStream_t stream) {
  if (args.merged_roles) {
    // A block that waits must not keep one that has yet to push from starting.
    int device = 0, multiprocessors = 0, resident = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, BlockCombineKernel<Element>,
                                                            kBlockTeamThreads, 0);
    }
    if (error != cudaSuccess) return error;
    const int blocks = std::min(args.push_blocks, resident * multiprocessors);
    BlockCombineKernel<Element><<<blocks, kBlockTeamThreads, 0, stream>>>(args);
  } else {
    PipedCombineKernel<Element>
        <<<args.push_blocks + args.reduce_blocks, kPipeThreads, sizeof(PipeShared), stream>>>(args);
  }
  return cudaGetLastError();
}

template <typename Element>
absl::Status LoadKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(PipedCombineKernel<Element>));
  EPS_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(PipedCombineKernel<Element>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                sizeof(PipeShared)));
  return LoadKernel(BlockCombineKernel<Element>);
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
