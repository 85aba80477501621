// The rows that combine adds up, and their order: what its kernels share. Walks are made by whole
// warps, whose lanes each hold one expert or one rank of the present row.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_DEVICE_CUH_

#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

// One expert of a row, a lane's: where its output is in expert_rows, -1: nowhere here.
struct ListedExpert {
  int index = -1;
  float weight = 0.0f;
};

__device__ inline ListedExpert LoadExpert(const CudaCombineArgs& args, const AreaUse& use,
                                          std::int64_t row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  ListedExpert expert;
  if (lane >= args.topk || row < 0 || row >= args.area.layout.row_capacity) return expert;
  const std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  expert.index = args.expert_index[row * args.topk + lane];
  expert.weight = WeightNotes(own, args.area.layout, row, args.topk)[lane];
  return expert;
}

// rows_from[r] = rows that rank r sent here, by the threads below R. A __syncthreads() comes after.
__device__ inline void LoadRowsFrom(const CudaCombineArgs& args, const AreaUse& use,
                                    int* rows_from) {
  if (threadIdx.x >= static_cast<unsigned>(args.area.num_ranks)) return;
  const std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const auto source = static_cast<int>(threadIdx.x);
  const int known = args.recv_rows[source];
  rows_from[source] = known >= 0 ? known : CountedRows(own, args.area, source);
}

// The rows that peers sent here, of all peers in turn, so that all links carry evenly: index i is
// row i / (R - 1) of one of them, if it has so many.
class PeerRowOrder {
 public:
  explicit __device__ PeerRowOrder(const CudaCombineArgs& args)
      : rank_(args.area.rank), num_ranks_(args.area.num_ranks), num_peers_(num_ranks_ - 1) {}

  // To be called once `rows_from` is known, before AtEnd() and IsMissing().
  __device__ void Begin(const int* rows_from) {
    rows_from_ = rows_from;
    for (int r = 0; r < num_ranks_; ++r) {
      if (r != rank_) longest_ = max(longest_, rows_from[r]);
    }
  }

  // `shift`: turns the peers' order, for a team whose stride would have it meet one peer each time.
  __device__ int SourceOf(int i, int shift) const {
    return (rank_ + 1 + (i + shift) % num_peers_) % num_ranks_;
  }
  __device__ int JOf(int i) const { return i / num_peers_; }
  __device__ int ShiftOf(int i, int stride) const {
    return stride > 0 && stride % num_peers_ == 0 ? i / stride : 0;
  }
  __device__ bool IsPastAll(int i) const { return i >= longest_ * num_peers_; }
  __device__ bool Has(int i, int source) const { return JOf(i) < rows_from_[source]; }
  __device__ bool has_peers() const { return num_peers_ > 0; }

 private:
  int rank_;
  int num_ranks_;
  int num_peers_;
  const int* rows_from_ = nullptr;
  int longest_ = 0;
};

// A team's walk over the rows that peers sent, with the experts of the present and the next one on
// their way.
class PeerRows {
 public:
  __device__ PeerRows(const CudaCombineArgs& args, const AreaUse& use, int first, int stride)
      : args_(args), use_(use), order_(args), i_(first), stride_(stride) {
    // Before it is known how many rows have come: one past the last is not used.
    row_ = Look(first);
    next_ = Look(first + stride);
  }

  // To be called once `rows_from` is known, before the first row is used.
  __device__ void Begin(const int* rows_from) {
    order_.Begin(rows_from);
    SkipMissing();
  }

  __device__ bool AtEnd() const { return order_.IsPastAll(i_); }
  __device__ int source() const { return row_.source; }
  __device__ int j() const { return order_.JOf(i_); }
  __device__ const ListedExpert& expert() const { return row_.expert; }

  __device__ void Advance() {
    Step();
    SkipMissing();
  }

 private:
  struct Row {
    int source = 0;
    ListedExpert expert;
  };

  __device__ Row Look(int i) const {
    Row row;
    if (!order_.has_peers()) return row;
    row.source = order_.SourceOf(i, order_.ShiftOf(i, stride_));
    row.expert = LoadExpert(args_, use_, std::int64_t{args_.recv_base[row.source]} + order_.JOf(i));
    return row;
  }

  __device__ void Step() {
    i_ += stride_;
    row_ = next_;
    next_ = Look(i_ + stride_);
  }

  __device__ void SkipMissing() {
    while (!AtEnd() && !order_.Has(i_, row_.source)) Step();
  }

  const CudaCombineArgs& args_;
  const AreaUse& use_;
  PeerRowOrder order_;
  int i_;
  int stride_;
  Row row_;
  Row next_;
};

// A team's walk over this rank's own tokens, with the experts of the present and the next one on
// their way, and the place of the one after.
class OwnTokens {
 public:
  __device__ OwnTokens(const CudaCombineArgs& args, const AreaUse& use, std::int64_t first,
                       std::int64_t stride)
      : args_(args), use_(use), token_(first), stride_(stride) {
    position_ = LoadPosition(first);
    next_position_ = LoadPosition(first + stride);
    later_position_ = LoadPosition(first + 2 * stride);
    expert_ = LoadOwnExpert(position_);
    next_expert_ = LoadOwnExpert(next_position_);
  }

  __device__ bool AtEnd() const { return token_ >= args_.num_tokens; }
  __device__ std::int64_t token() const { return token_; }
  __device__ const ListedExpert& expert() const { return expert_; }

  __device__ void Advance() {
    token_ += stride_;
    position_ = next_position_;
    expert_ = next_expert_;
    next_position_ = later_position_;
    next_expert_ = LoadOwnExpert(next_position_);
    later_position_ = LoadPosition(token_ + 2 * stride_);
  }

  // Lane r: whether rank r has a partial row of the token for this rank.
  __device__ bool HasPartial() const {
    return position_ >= 0 && static_cast<int>(threadIdx.x) % kWarpSize != args_.area.rank;
  }

  // Lane r: rank r's partial row, where it has one.
  __device__ const uint4* Partial(std::int64_t num_vectors) const {
    const std::byte* own = args_.area.heap[args_.area.rank] + use_.byte_offset;
    return reinterpret_cast<const uint4*>(own + args_.area.layout.partials) +
           PartialIndex() * num_vectors;
  }

  // Lane r: whether rank r has a partial row and it is here.
  __device__ bool PartialHasArrived() const {
    if (!HasPartial()) return false;
    // acquire, system: as in WaitAtLeast.
    return cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*PartialFlag())
               .load(cuda::memory_order_acquire) >= use_.use;
  }

  // Lane r: waits for rank r's partial row, where it has one. False where there is none or the wait
  // gave up.
  __device__ bool WaitForPartial() const {
    if (!HasPartial()) return false;
    return WaitAtLeast(PartialFlag(), use_.use, static_cast<int>(threadIdx.x) % kWarpSize,
                       WaitStage::kCombine, args_.wait);
  }

 private:
  __device__ std::int64_t PartialIndex() const {
    if (!HasPartial()) return 0;
    return std::int64_t{args_.partial_base[threadIdx.x % kWarpSize]} + position_;
  }

  __device__ std::uint64_t* PartialFlag() const {
    std::byte* own = args_.area.heap[args_.area.rank] + use_.byte_offset;
    return reinterpret_cast<std::uint64_t*>(own + args_.area.layout.row_flags) + PartialIndex();
  }

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
  int later_position_;
  ListedExpert expert_;
  ListedExpert next_expert_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_DEVICE_CUH_
