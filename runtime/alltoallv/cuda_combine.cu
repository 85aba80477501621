// Combine: one launch with two roles. Pushing takes the weighted sum of each row that a peer sent
// over its local experts, and writes the one partial row to the row's source, with a flag a row.
// Reducing makes this rank's own tokens: the weighted sum of their local experts' rows, which go
// nowhere, and then the peers' partial rows as they come in, in ascending rank order. So every
// expert row is read once, and the reading of one row overlaps the link's carrying of the next.
//
// Push blocks come first in the grid and wait for nobody; reduce blocks wait only for other ranks'
// push blocks: no cycle, however blocks are scheduled. Where the blocks have both roles, each has
// pushed all of its rows before it waits, and all blocks are resident at once.
//
// The kernel here is for few rows, whose latency counts: a whole block works on each, or many warps
// where sums travel as lines, as the rows that they belong to have (cuda_combine_lines.cuh).
// The one for many rows is in cuda_combine_stream.cu; all add in the same order, so that the bits
// are the same.
#include <algorithm>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_combine_device.cuh"
#include "runtime/alltoallv/cuda_combine_lines.cuh"
#include "runtime/alltoallv/cuda_combine_stream.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/device_limits.h"
#include "runtime/base/cuda_status.h"
#include "runtime/base/limits.h"

namespace epserve::runtime {
namespace {

// How this rank's own tokens went to the peers, and their sums come back. A peer's may differ.
enum class OwnWay { kRows, kLines, kFewLines };

template <OwnWay kWay>
using UnitsOf = std::conditional_t<kWay == OwnWay::kFewLines, NarrowUnits, WideUnits>;

// Sixteen 16-byte loads a thread are on their way at a time, and two blocks of rows fit a
// multiprocessor.
template <OwnWay kWay>
constexpr int kThreadsOf = kWay == OwnWay::kRows ? 256 : 384;
// Eighths of the blocks that push lines. On 4 H200s, 128 tokens of 7168 bf16 a rank: 1 took 52 us,
// 2 31, 3 28.1, 4 27.8.
constexpr int kPushShare = 3;
constexpr int kRowsAtOnce = 4;
constexpr int kPiecesAtOnce = 4;
constexpr int kMaxSources = kMaxTopk + kMaxCudaRanks;

// A sum: weight * row, in the list's order.
struct SourceList {
  const uint4* row[kMaxSources];
  float weight[kMaxSources];
  int size;
};

struct CombineShared {
  SourceList list;
  int rows_from[kMaxCudaRanks];   // that each rank sent to this one, other than as lines
  int lines_from[kMaxCudaRanks];  // rows that came as lines
  bool gave_up;
};

// Lists the present lanes' rows behind the first `size` of the list, in the lanes' order, and
// returns the new size. Called by a whole warp.
__device__ int Append(bool present, const uint4* row, float weight, int size, SourceList* list) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const unsigned all = __ballot_sync(0xffffffffu, present);
  if (present) {
    const int place = size + __popc(all & ((1u << lane) - 1u));
    list->row[place] = row;
    list->weight[place] = weight;
  }
  size += __popc(all);
  if (lane == 0) list->size = size;
  return size;
}

__device__ int AppendExperts(const CudaCombineArgs& args, const ListedExpert& expert,
                             std::int64_t num_vectors, SourceList* list) {
  const auto* rows = static_cast<const uint4*>(args.expert_rows);
  return Append(expert.index >= 0, rows + expert.index * num_vectors, expert.weight, 0, list);
}

// A thread's share of a sum: kPiecesAtOnce vectors of a row, a block's width apart.
template <typename Element, int kThreads>
class Sum {
 public:
  using V = Vector16<Element>;

  __device__ Sum(std::int64_t start, std::int64_t num_vectors)
      : first_(start + threadIdx.x), num_vectors_(num_vectors) {}

  // Adds the listed rows [begin, end). Several rows' pieces are on their way at a time, so that the
  // latency of memory is paid once for all; `while_loading` runs while each lot is.
  template <typename WhileLoading>
  __device__ void Add(const SourceList& list, int begin, int end, WhileLoading while_loading) {
    for (int s = begin; s < end; s += kRowsAtOnce) {
      uint4 piece[kRowsAtOnce][kPiecesAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (s + i >= end) break;
        const uint4* row = list.row[s + i] + first_;
#pragma unroll
        for (int u = 0; u < kPiecesAtOnce; ++u) {
          // From L2: a peer may have written the row since this SM last saw the line.
          if (Inside(u)) piece[i][u] = __ldcg(row + u * kThreads);
        }
      }
      while_loading();
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (s + i >= end) break;
        const float weight = list.weight[s + i];
#pragma unroll
        for (int u = 0; u < kPiecesAtOnce; ++u) {
          if (Inside(u)) V::MultiplyAdd(piece[i][u], weight, sum_[u]);
        }
      }
    }
  }

  __device__ void Store(uint4* out) const {
#pragma unroll
    for (int u = 0; u < kPiecesAtOnce; ++u) {
      if (Inside(u)) out[first_ + u * kThreads] = V::Pack(sum_[u]);
    }
  }

  // From one sum's start to the next one's.
  static constexpr __device__ int Stride() { return kPiecesAtOnce * kThreads; }

 private:
  __device__ bool Inside(int u) const { return first_ + u * kThreads < num_vectors_; }

  std::int64_t first_;
  std::int64_t num_vectors_;
  float sum_[kPiecesAtOnce][V::kElements] = {};
};

// Pushes the block's rows. The flag of a row is raised while the next one's pieces are on their
// way: a release waits until its stores have arrived, which takes as long.
template <typename Element, int kThreads>
__device__ void Push(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors,
                     PeerRows* rows, SourceList* list) {
  using S = Sum<Element, kThreads>;
  const AreaLayout& layout = args.area.layout;
  std::uint64_t* written_flag = nullptr;
  const auto raise_flag = [&] {
    if (written_flag == nullptr) return;
    if (threadIdx.x == 0) PublishRow(written_flag, use.use);
    written_flag = nullptr;
  };
  while (!rows->AtEnd()) {
    if (threadIdx.x < kWarpSize) AppendExperts(args, rows->expert(), num_vectors, list);
    std::byte* there = args.area.heap[rows->source()] + use.byte_offset;
    const std::int64_t partial = args.return_base[rows->source()] + rows->j();
    auto* out = reinterpret_cast<uint4*>(there + layout.partials) + partial * num_vectors;
    rows->Advance();
    __syncthreads();
    for (std::int64_t start = 0; start < num_vectors; start += S::Stride()) {
      S sum(start, num_vectors);
      sum.Add(*list, 0, list->size, raise_flag);
      sum.Store(out);
    }
    raise_flag();     // The row before, where this one has no experts.
    __syncthreads();  // Orders the block's stores before the release; frees the list.
    written_flag = reinterpret_cast<std::uint64_t*>(there + layout.row_flags) + partial;
  }
  raise_flag();
}

// Waits for the peers' partial rows of the token and lists them; one whose wait gave up is left
// out. Called by a whole warp.
__device__ int AppendPartials(const OwnTokens& tokens, std::int64_t num_vectors, int size,
                              SourceList* list) {
  const bool arrived = tokens.WaitForPartial();
  return Append(arrived, tokens.Partial(num_vectors), 1.0f, size, list);
}

template <typename Element>
__device__ void Reduce(const CudaCombineArgs& args, std::int64_t num_vectors, OwnTokens* tokens,
                       SourceList* list) {
  using S = Sum<Element, kThreadsOf<OwnWay::kRows>>;
  for (; !tokens->AtEnd(); __syncthreads()) {
    const bool lists = threadIdx.x < kWarpSize;
    int listed = 0;
    if (lists) listed = AppendExperts(args, tokens->expert(), num_vectors, list);
    auto* out = static_cast<uint4*>(args.out) + tokens->token() * num_vectors;
    // This rank's own experts' rows are added before the peers' are waited for.
    __syncthreads();
    const int num_experts = list->size;
    S sum(0, num_vectors);
    sum.Add(*list, 0, num_experts, [] {});
    __syncthreads();  // All have read the size.
    if (lists) AppendPartials(*tokens, num_vectors, listed, list);
    tokens->Advance();
    __syncthreads();
    const int num_sources = list->size;
    sum.Add(*list, num_experts, num_sources, [] {});
    sum.Store(out);
    for (std::int64_t start = S::Stride(); start < num_vectors; start += S::Stride()) {
      S more(start, num_vectors);
      more.Add(*list, 0, num_sources, [] {});
      more.Store(out);
    }
  }
}

// What came the other way than this rank's own tokens went. Out of line: it is rare, and must not
// cost the kernel's other parts their registers.
template <typename Element>
__device__ __noinline__ void PushRowsToo(const CudaCombineArgs& args, AreaUse use,
                                         std::int64_t num_vectors, CombineShared* shared) {
  PeerRows rows(args, use, static_cast<int>(blockIdx.x), args.push_blocks);
  rows.Begin(shared->rows_from);
  Push<Element, kThreadsOf<OwnWay::kLines>>(args, use, num_vectors, &rows, &shared->list);
}

template <typename Element>
__device__ __noinline__ void PushLinesToo(const CudaCombineArgs& args, AreaUse use,
                                          std::int64_t num_vectors, const CombineShared& shared) {
  const LinePushes<Element, WideUnits> lines(args, use, num_vectors);
  lines.Push(shared.lines_from);
}

// Pushes what peers sent as rows and as lines, this rank's own way first, and advances the use.
// False where nothing may be sent.
template <typename Element, OwnWay kWay>
__device__ bool PushAll(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors,
                        CombineShared* shared) {
  const auto look = [&] {
    LoadRowsFrom(args, use, shared->rows_from);
    LoadLinesFrom(args, use, shared->lines_from, shared->rows_from);
    if (threadIdx.x == 0) shared->gave_up = GaveUp(args.wait);
    __syncthreads();
    AdvanceUse(args.area, 1);  // No thread waits for the one that does it.
    return !shared->gave_up;   // What would be sent is made of rows that never came.
  };
  if constexpr (kWay == OwnWay::kRows) {
    PeerRows rows(args, use, static_cast<int>(blockIdx.x), args.push_blocks);
    if (!look()) return false;
    rows.Begin(shared->rows_from);
    Push<Element, kThreadsOf<kWay>>(args, use, num_vectors, &rows, &shared->list);
    if (args.area.layout.line_capacity > 0) {
      PushLinesToo<Element>(args, use, num_vectors, *shared);
    }
  } else {
    const LinePushes<Element, UnitsOf<kWay>> lines(args, use, num_vectors);
    if (!look()) return false;
    lines.Push(shared->lines_from);
    int some = 0;
    for (int r = 0; r < args.area.num_ranks; ++r) {
      if (r != args.area.rank) some |= shared->rows_from[r];
    }
    if (some != 0) PushRowsToo<Element>(args, use, num_vectors, shared);
  }
  return true;
}

template <typename Element, OwnWay kWay>
__global__ void __launch_bounds__(kThreadsOf<kWay>, kWay == OwnWay::kRows ? 2 : 1)
    CombineKernel(const __grid_constant__ CudaCombineArgs args) {
  __shared__ CombineShared shared;
  const AreaUse use = CurrentUse(args.area, 1);
  AwaitEarlierKernels();
  const std::int64_t num_vectors = args.hidden / Vector16<Element>::kElements;
  const int block = static_cast<int>(blockIdx.x);
  if (block >= args.push_blocks) {
    AdvanceUse(args.area, 1);
  } else if (!PushAll<Element, kWay>(args, use, num_vectors, &shared)) {
    return;
  }
  if (!args.merged_roles && block < args.push_blocks) return;
  const int first_reducer = args.merged_roles ? 0 : args.push_blocks;
  if constexpr (kWay != OwnWay::kRows) {
    ReduceLines<Element, UnitsOf<kWay>>(args, use, num_vectors,
                                        GridWarp(args.reduce_blocks, first_reducer),
                                        args.reduce_blocks * kThreadsOf<kWay> / kWarpSize);
  } else {
    // With both roles, the blocks that push least reduce first.
    const int reducer =
        args.merged_roles ? args.reduce_blocks - 1 - block : block - args.push_blocks;
    OwnTokens tokens(args, use, reducer, args.reduce_blocks);
    Reduce<Element>(args, num_vectors, &tokens, &shared.list);
  }
}

// Blocks that have both roles must all be resident: one that waits must not keep one that has yet
// to push from starting.
template <typename Kernel>
cudaError_t ResidentBlocks(Kernel kernel, int threads, int* blocks) {
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
  }
  *blocks = resident * multiprocessors;
  return error;
}

template <typename Element, OwnWay kWay>
cudaError_t LaunchFew(const CudaCombineArgs& args, cudaStream_t stream) {
  const int blocks = args.merged_roles ? args.push_blocks : args.push_blocks + args.reduce_blocks;
  // Few rows: the launch takes as long as the work, and may overlap with the kernel before. Counted
  // on the device, where dispatch, which does not start early, stands between two of the counter's
  // uses.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(kThreadsOf<kWay>));
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = args.area.device_sequence != nullptr ? 1 : 0;
  return cudaLaunchKernelEx(&config, CombineKernel<Element, kWay>, args);
}

template <typename Element>
cudaError_t LaunchRows(CudaCombineArgs args, cudaStream_t stream) {
  if (args.merged_roles) {
    int resident = 0;
    const cudaError_t error =
        ResidentBlocks(CombineKernel<Element, OwnWay::kRows>, kThreadsOf<OwnWay::kRows>, &resident);
    if (error != cudaSuccess) return error;
    args.push_blocks = args.reduce_blocks = std::min(args.push_blocks, resident);
  }
  return LaunchFew<Element, OwnWay::kRows>(args, stream);
}

// `pushed`: about how many rows go to peers.
template <typename Element>
cudaError_t LaunchLines(CudaCombineArgs args, std::int64_t pushed, cudaStream_t stream) {
  constexpr int kWarps = kThreadsOf<OwnWay::kLines> / kWarpSize;
  if (args.merged_roles) {
    int resident = 0;
    const cudaError_t error = ResidentBlocks(CombineKernel<Element, OwnWay::kLines>,
                                             kThreadsOf<OwnWay::kLines>, &resident);
    if (error != cudaSuccess) return error;
    const int blocks = std::min(args.push_blocks, resident);
    args.push_blocks = args.reduce_blocks = blocks;
    if (blocks > 1) {
      // Those that add up look for lines where no stores stand before their looks.
      args.merged_roles = false;
      args.push_blocks = std::max(blocks * kPushShare / 8, 1);
      args.reduce_blocks = blocks - args.push_blocks;
    }
  }
  const PlainLines lines(static_cast<int>(args.hidden / Vector16<Element>::kElements), 0);
  const int num_units = CeilDivide(lines.count(), kLinesOf<NarrowUnits>);
  return pushed * num_units <= std::int64_t{args.push_blocks} * kWarps
             ? LaunchFew<Element, OwnWay::kFewLines>(args, stream)
             : LaunchFew<Element, OwnWay::kLines>(args, stream);
}

template <typename Element>
cudaError_t Launch(const CudaCombineArgs& args, cudaStream_t stream) {
  // Few rows a block: their latency counts.
  constexpr std::int64_t kFewRows = 8;
  std::int64_t pushed = 0;
  for (int r = 0; r < args.area.num_ranks; ++r) {
    if (r == args.area.rank) continue;
    // Shards are alike: of a source that has not been counted here, as many rows as this rank's.
    pushed += args.recv_rows[r] < 0 ? args.num_tokens : args.recv_rows[r];
  }
  const bool few =
      args.num_tokens <= kFewRows * args.reduce_blocks && pushed <= kFewRows * args.push_blocks;
  if (SendsLines(args.area, args.num_tokens)) return LaunchLines<Element>(args, pushed, stream);
  return few || args.merged_roles ? LaunchRows<Element>(args, stream)
                                  : LaunchStreamCombine<Element>(args, stream);
}

}  // namespace

template <typename Element>
absl::Status LoadFew() {
  EPS_RETURN_IF_ERROR(LoadKernel(CombineKernel<Element, OwnWay::kRows>));
  EPS_RETURN_IF_ERROR(LoadKernel(CombineKernel<Element, OwnWay::kFewLines>));
  return LoadKernel(CombineKernel<Element, OwnWay::kLines>);
}

absl::Status LoadCombineKernels() {
  EPS_RETURN_IF_ERROR(LoadFew<__nv_bfloat16>());
  EPS_RETURN_IF_ERROR(LoadFew<__half>());
  EPS_RETURN_IF_ERROR(LoadFew<float>());
  return LoadStreamCombineKernels();
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
  EPS_RETURN_IF_ERROR(CheckRowBytes("combine", args.hidden, args.dtype));
  if (args.topk < 1 || args.topk > kMaxTopk) {
    return absl::InvalidArgumentError(
        absl::StrCat("combine: topk ", args.topk, " outside [1, ", kMaxTopk, "]"));
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
