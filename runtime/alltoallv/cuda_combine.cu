// Combine: one launch with two roles. Pushing takes the weighted sum of each row that a peer sent
// over its local experts, and writes the one partial row to the row's source, with a flag a row.
// Reducing makes this rank's own tokens: the weighted sum of their local experts' rows, which go
// nowhere, and then the peers' partial rows as they come in, in ascending rank order. So every
// expert row is read once, and the reading of one row overlaps the link's carrying of the next.
//
// Push blocks come first in the grid and wait for nobody; reduce blocks wait only for other ranks'
// push blocks: no cycle, however blocks are scheduled. Where the blocks have both roles, each has
// pushed all of its rows before it waits, and all blocks are resident at once.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kWarpSize = 32;
// Sixteen 16-byte loads a thread are on their way at a time: 128 KiB a multiprocessor, from the 128
// registers that so many threads leave each.
constexpr int kWarpTeamThreads = 512;
constexpr int kBlockTeamThreads = 256;  // two blocks a multiprocessor
constexpr int kMaxTeams = kWarpTeamThreads / kWarpSize;
constexpr int kRowsAtOnce = 4;
constexpr int kPiecesAtOnce = 4;
constexpr int kMaxSources = kMaxCudaTopk + kMaxCudaRanks;

// A team's sum: weight * row, in the list's order.
struct SourceList {
  const uint4* row[kMaxSources];
  float weight[kMaxSources];
  int size;
};

struct CombineShared {
  SourceList list[kMaxTeams];
  int rows_from[kMaxCudaRanks];  // that each rank sent to this one
};

// One expert of a row, a lane's: where its output is in expert_rows, -1: nowhere here.
struct ListedExpert {
  int index = -1;
  float weight = 0.0f;
};

__device__ ListedExpert LoadExpert(const CudaCombineArgs& args, const AreaUse& use,
                                   std::int64_t row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  ListedExpert expert;
  if (lane >= args.topk || row < 0 || row >= args.area.layout.row_capacity) return expert;
  const std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const std::int64_t at = row * args.topk + lane;
  expert.index = args.expert_index[at];
  expert.weight = reinterpret_cast<const float*>(own + args.area.layout.topk_weights)[at];
  return expert;
}

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

// A thread's share of a sum: kPiecesAtOnce vectors of a row, a team's width apart.
template <typename Element, RowTeam kTeam>
class Sum {
 public:
  using T = Team<kTeam>;
  using V = Vector16<Element>;

  __device__ Sum(std::int64_t start, std::int64_t num_vectors)
      : first_(start + T::rank()), num_vectors_(num_vectors) {}

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
          if (Inside(u)) piece[i][u] = __ldcg(row + u * T::size());
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
      if (Inside(u)) out[first_ + u * T::size()] = V::Pack(sum_[u]);
    }
  }

  // From one sum's start to the next one's.
  static __device__ int Stride() { return kPiecesAtOnce * T::size(); }

 private:
  __device__ bool Inside(int u) const { return first_ + u * T::size() < num_vectors_; }

  std::int64_t first_;
  std::int64_t num_vectors_;
  float sum_[kPiecesAtOnce][V::kElements] = {};
};

// A team's walk over the rows that peers sent, with the present row's experts on their way. Peers
// take turns, so that all links carry evenly and every team serves all of them.
class PeerRows {
 public:
  __device__ PeerRows(const CudaCombineArgs& args, const AreaUse& use, int first, int stride)
      : args_(args), use_(use), i_(first), stride_(stride) {
    Look();  // Before it is known how many rows have come: one past the last is not used.
  }

  // To be called once `rows_from` is known, before the first row is used.
  __device__ void Begin(const int* rows_from) {
    rows_from_ = rows_from;
    for (int r = 0; r < args_.area.num_ranks; ++r) {
      if (r != args_.area.rank) longest_ = max(longest_, rows_from[r]);
    }
    SkipMissing();
  }

  __device__ bool AtEnd() const { return i_ >= longest_ * num_peers(); }
  __device__ int source() const { return source_; }
  __device__ int j() const { return i_ / num_peers(); }
  __device__ const ListedExpert& expert() const { return expert_; }

  __device__ void Advance() {
    i_ += stride_;
    Look();
    SkipMissing();
  }

 private:
  __device__ int num_peers() const { return args_.area.num_ranks - 1; }

  __device__ void Look() {
    if (num_peers() == 0) return;
    // Where a stride is whole turns, a team would meet the same peer each time.
    const int shift = stride_ % num_peers() == 0 ? i_ / stride_ : 0;
    const int turn = (i_ + shift) % num_peers();
    source_ = (args_.area.rank + 1 + turn) % args_.area.num_ranks;
    expert_ = LoadExpert(args_, use_, std::int64_t{args_.recv_base[source_]} + j());
  }

  __device__ void SkipMissing() {
    while (!AtEnd() && j() >= rows_from_[source_]) {
      i_ += stride_;
      Look();
    }
  }

  const CudaCombineArgs& args_;
  const AreaUse& use_;
  int i_;  // of all peers' rows: row i / (R - 1) of one of them
  int stride_;
  const int* rows_from_ = nullptr;
  int longest_ = 0;
  int source_ = 0;
  ListedExpert expert_;
};

// Pushes the team's rows. The flag of a row is raised while the next one's pieces are on their way:
// a release waits until its stores have arrived, which takes as long.
template <typename Element, RowTeam kTeam>
__device__ void Push(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors,
                     PeerRows* rows, SourceList* list) {
  using T = Team<kTeam>;
  using S = Sum<Element, kTeam>;
  const AreaLayout& layout = args.area.layout;
  std::uint64_t* written_flag = nullptr;
  const auto raise_flag = [&] {
    if (written_flag == nullptr) return;
    if (T::rank() == 0) PublishRow(written_flag, use.use);
    written_flag = nullptr;
  };
  while (!rows->AtEnd()) {
    if (T::rank() < kWarpSize) AppendExperts(args, rows->expert(), num_vectors, list);
    std::byte* there = args.area.heap[rows->source()] + use.byte_offset;
    const std::int64_t partial = args.return_base[rows->source()] + rows->j();
    auto* out = reinterpret_cast<uint4*>(there + layout.partials) + partial * num_vectors;
    rows->Advance();
    T::sync();
    for (std::int64_t start = 0; start < num_vectors; start += S::Stride()) {
      S sum(start, num_vectors);
      sum.Add(*list, 0, list->size, raise_flag);
      sum.Store(out);
    }
    raise_flag();  // The row before, where this one has no experts.
    T::sync();     // Orders the team's stores before the release; frees the list.
    written_flag = reinterpret_cast<std::uint64_t*>(there + layout.row_flags) + partial;
  }
  raise_flag();
}

// A team's walk over this rank's own tokens. What the present one needs has been loaded while the
// one before was worked on, and the place of the next while that was.
class OwnTokens {
 public:
  __device__ OwnTokens(const CudaCombineArgs& args, const AreaUse& use, std::int64_t first,
                       std::int64_t stride)
      : args_(args), use_(use), token_(first), stride_(stride) {
    position_ = LoadPosition(first);
    next_position_ = LoadPosition(first + stride);
    expert_ = LoadOwnExpert(position_);
  }

  __device__ bool AtEnd() const { return token_ >= args_.num_tokens; }
  __device__ std::int64_t token() const { return token_; }
  __device__ const ListedExpert& expert() const { return expert_; }

  __device__ void Advance() {
    token_ += stride_;
    position_ = next_position_;
    expert_ = LoadOwnExpert(position_);
    next_position_ = LoadPosition(token_ + stride_);
  }

  // Waits for the peers' partial rows of the token and lists them; one whose wait gave up is left
  // out. Called by a whole warp.
  __device__ int AppendPartials(std::int64_t num_vectors, int size, SourceList* list) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    std::byte* own = args_.area.heap[args_.area.rank] + use_.byte_offset;
    const bool sent = position_ >= 0 && lane != args_.area.rank;
    const std::int64_t partial = sent ? args_.partial_base[lane] + position_ : 0;
    auto* flags = reinterpret_cast<std::uint64_t*>(own + args_.area.layout.row_flags);
    const bool arrived =
        sent && WaitAtLeast(flags + partial, use_.use, lane, WaitStage::kCombine, args_.wait);
    const auto* partials = reinterpret_cast<const uint4*>(own + args_.area.layout.partials);
    return Append(arrived, partials + partial * num_vectors, 1.0f, size, list);
  }

 private:
  // Lane r: the token's place among the rows to rank r, -1: none.
  __device__ int LoadPosition(std::int64_t token) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const bool has_place = lane < args_.area.num_ranks && token < args_.num_tokens;
    return has_place ? args_.send_position[token * args_.area.num_ranks + lane] : -1;
  }

  __device__ ListedExpert LoadOwnExpert(int position) const {
    const int own = __shfl_sync(0xffffffffu, position, args_.area.rank);
    if (own < 0) return {};
    return LoadExpert(args_, use_, std::int64_t{args_.recv_base[args_.area.rank]} + own);
  }

  const CudaCombineArgs& args_;
  const AreaUse& use_;
  std::int64_t token_;
  std::int64_t stride_;
  int position_;
  int next_position_;
  ListedExpert expert_;
};

template <typename Element, RowTeam kTeam>
__device__ void Reduce(const CudaCombineArgs& args, std::int64_t num_vectors, OwnTokens* tokens,
                       SourceList* list) {
  using T = Team<kTeam>;
  using S = Sum<Element, kTeam>;
  for (; !tokens->AtEnd(); T::sync()) {
    const bool lists = T::rank() < kWarpSize;
    int listed = 0;
    if (lists) listed = AppendExperts(args, tokens->expert(), num_vectors, list);
    auto* out = static_cast<uint4*>(args.out) + tokens->token() * num_vectors;
    if constexpr (kTeam == RowTeam::kWarp) {
      tokens->AppendPartials(num_vectors, listed, list);
      tokens->Advance();
      T::sync();
      for (std::int64_t start = 0; start < num_vectors; start += S::Stride()) {
        S sum(start, num_vectors);
        sum.Add(*list, 0, list->size, [] {});
        sum.Store(out);
      }
    } else {
      // This rank's own experts' rows are added before the peers' are waited for.
      T::sync();
      const int num_experts = list->size;
      S sum(0, num_vectors);
      sum.Add(*list, 0, num_experts, [] {});
      T::sync();  // All have read the size.
      if (lists) tokens->AppendPartials(num_vectors, listed, list);
      tokens->Advance();
      T::sync();
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
}

template <typename Element, RowTeam kTeam>
__global__ void __launch_bounds__(kTeam == RowTeam::kWarp ? kWarpTeamThreads : kBlockTeamThreads,
                                  kTeam == RowTeam::kWarp ? 1 : 2)
    CombineKernel(const __grid_constant__ CudaCombineArgs args) {
  using T = Team<kTeam>;
  __shared__ CombineShared shared;
  const AreaUse use = BeginUse(args.area, 1);
  const std::int64_t num_vectors = args.hidden / Vector16<Element>::kElements;
  const int block = static_cast<int>(blockIdx.x);
  SourceList* list = &shared.list[T::index()];
  if (block < args.push_blocks) {
    PeerRows rows(args, use, T::index() * args.push_blocks + block, args.push_blocks * T::count());
    if (threadIdx.x < static_cast<unsigned>(args.area.num_ranks)) {
      const auto* counts = reinterpret_cast<const std::int32_t*>(
          args.area.heap[args.area.rank] + use.byte_offset + args.area.layout.counts);
      const int known = args.recv_rows[threadIdx.x];
      // From L2: written by a peer.
      shared.rows_from[threadIdx.x] = known >= 0 ? known : __ldcg(counts + threadIdx.x);
    }
    __syncthreads();
    rows.Begin(shared.rows_from);
    Push<Element, kTeam>(args, use, num_vectors, &rows, list);
  }
  if (!args.merged_roles && block < args.push_blocks) return;
  // With both roles, the blocks that push least reduce first.
  const int reducer = args.merged_roles ? args.reduce_blocks - 1 - block : block - args.push_blocks;
  OwnTokens tokens(args, use, std::int64_t{T::index()} * args.reduce_blocks + reducer,
                   std::int64_t{args.reduce_blocks} * T::count());
  Reduce<Element, kTeam>(args, num_vectors, &tokens, list);
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

template <typename Element, RowTeam kTeam>
cudaError_t Launch(CudaCombineArgs args, cudaStream_t stream) {
  constexpr int kThreads = kTeam == RowTeam::kWarp ? kWarpTeamThreads : kBlockTeamThreads;
  int blocks = args.push_blocks + args.reduce_blocks;
  if (args.merged_roles) {
    int resident = 0;
    const cudaError_t error = ResidentBlocks(CombineKernel<Element, kTeam>, kThreads, &resident);
    if (error != cudaSuccess) return error;
    blocks = std::min(args.push_blocks, resident);
    args.push_blocks = args.reduce_blocks = blocks;
  }
  CombineKernel<Element, kTeam><<<blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t Launch(const CudaCombineArgs& args, cudaStream_t stream) {
  // Few rows a block: their latency counts, so a whole block works on each.
  constexpr std::int64_t kFewRows = 8;
  std::int64_t pushed = 0;
  for (int r = 0; r < args.area.num_ranks; ++r) {
    const bool known = r != args.area.rank && args.recv_rows[r] > 0;
    pushed += known ? args.recv_rows[r] : 0;
  }
  const bool few =
      args.num_tokens <= kFewRows * args.reduce_blocks && pushed <= kFewRows * args.push_blocks;
  return few ? Launch<Element, RowTeam::kBlock>(args, stream)
             : Launch<Element, RowTeam::kWarp>(args, stream);
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
