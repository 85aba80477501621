// Combine of few tokens: a partial row goes back as packets where its row came as such, and source
// and receiver both know that. Warps each take a chunk of a row, 16 bytes a lane, so that many
// multiprocessors share a row; none waits for another of its rank.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_PACKETS_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_PACKETS_CUH_

#include "runtime/alltoallv/cuda_combine_device.cuh"
#include "runtime/alltoallv/cuda_packet_device.cuh"

namespace epserve::runtime {

// packets_from[r] = rows that rank r sent here as packets, by the threads below R; such a rank has
// no others. After LoadRowsFrom() by the same threads; a __syncthreads() comes after.
__device__ inline void LoadPacketsFrom(const CudaCombineArgs& args, const AreaUse& use,
                                       int* packets_from, int* rows_from) {
  const auto source = static_cast<int>(threadIdx.x);
  if (source >= args.area.num_ranks) return;
  packets_from[source] = 0;
  if (args.area.layout.packet_capacity == 0 || source == args.area.rank) return;
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const PacketHead head = PacketHead::Of(LoadPacket(HeadOf(own, args.area.layout, source)).data);
  if (head.as_packets == 0) return;
  packets_from[source] = RowsOf(head, args.area.layout);
  rows_from[source] = 0;
}

// A lane's piece of a sum over experts' rows, in the lanes' order.
template <typename Element>
struct PieceSum {
  using V = Vector16<Element>;
  static constexpr int kAtOnce = 8;  // rows that are on their way together

  // Called by the whole warp; lane k holds expert k. `inside`: the lane has a piece.
  __device__ void AddExperts(const CudaCombineArgs& args, const ListedExpert& expert,
                             std::int64_t num_vectors, std::int64_t piece, bool inside) {
    const auto* rows = static_cast<const uint4*>(args.expert_rows);
    unsigned left = __ballot_sync(0xffffffffu, expert.index >= 0);
    while (left != 0) {
      uint4 vector[kAtOnce];
      float weight[kAtOnce];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (left == 0) break;
        const int lane = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        const std::int64_t row = __shfl_sync(0xffffffffu, expert.index, lane);
        weight[i] = __shfl_sync(0xffffffffu, expert.weight, lane);
        if (inside) vector[i] = __ldcg(rows + row * num_vectors + piece);
        count = i + 1;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < count && inside) V::MultiplyAdd(vector[i], weight[i], sum);
      }
    }
  }

  float sum[V::kElements] = {};
};

__device__ inline int PacketChunks(std::int64_t num_vectors) {
  return static_cast<int>((num_vectors + kWarpSize - 1) / kWarpSize);
}

// A warp's chunks of the rows that one peer sent as packets. The first one's experts are on their
// way before it is known whether there is one.
class PacketPushes {
 public:
  __device__ PacketPushes(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors)
      : args_(args), use_(use), num_vectors_(num_vectors), num_chunks_(PacketChunks(num_vectors)) {
    const int num_peers = args.area.num_ranks - 1;
    if (num_peers == 0 || args.area.layout.packet_capacity == 0) return;
    const int warp = GridWarp(args.push_blocks);
    const int num_warps = args.push_blocks * static_cast<int>(blockDim.x / kWarpSize);
    const int turn = warp % num_peers;
    source_ = (args.area.rank + 1 + turn) % args.area.num_ranks;
    first_ = warp / num_peers;
    stride_ = (num_warps - turn + num_peers - 1) / num_peers;
    expert_ = ExpertOf(first_);
  }

  template <typename Element>
  __device__ void Push(const int* packets_from) const {
    if (source_ < 0) return;
    const int count = packets_from[source_] * num_chunks_;
    std::byte* there = args_.area.heap[source_] + use_.byte_offset;
    for (int i = first_; i < count; i += stride_) {
      const int row = i / num_chunks_;
      const std::int64_t piece =
          std::int64_t{i % num_chunks_} * kWarpSize + threadIdx.x % kWarpSize;
      PieceSum<Element> sum;
      sum.AddExperts(args_, i == first_ ? expert_ : ExpertOf(i), num_vectors_, piece,
                     piece < num_vectors_);
      if (piece >= num_vectors_) continue;
      Packet* partial = PacketPartial(there, args_.area.layout, args_.area.rank, row);
      StoreVector(partial + 2 * piece, Vector16<Element>::Pack(sum.sum), use_.use);
    }
  }

 private:
  __device__ ListedExpert ExpertOf(int i) const {
    const int row = i / num_chunks_;
    if (row >= args_.area.layout.packet_capacity) return {};
    return LoadExpert(args_, use_, std::int64_t{args_.recv_base[source_]} + row);
  }

  const CudaCombineArgs& args_;
  const AreaUse& use_;
  std::int64_t num_vectors_;
  int num_chunks_;
  int source_ = -1;  // none: nobody sends packets
  int first_ = 0;
  int stride_ = 1;
  ListedExpert expert_;
};

// Adds the partial rows of ranks [begin, end), in their order, as they come in. Lane r holds in
// `position` the token's place among the rows to rank r, -1: none. A row whose wait gave up is left
// out.
template <typename Element, int kRanks>
__device__ void AddPartials(const CudaCombineArgs& args, const AreaUse& use, int position,
                            int begin, std::int64_t piece, bool inside, float* sum) {
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const Packet* from[kRanks];
#pragma unroll
  for (int i = 0; i < kRanks; ++i) {
    const int rank = begin + i;
    const int row = __shfl_sync(0xffffffffu, position, rank % kWarpSize);
    const bool comes = rank < args.area.num_ranks && rank != args.area.rank && row >= 0 && inside;
    from[i] = comes ? PacketPartial(own, args.area.layout, rank, row) + 2 * piece : nullptr;
  }
  PacketPair pair[kRanks];
  int missing = begin;
  const auto ready = [&] {
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      if (from[i] != nullptr) pair[i] = LoadPair(from[i]);
    }
    bool here = true;
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const bool has_come = from[i] == nullptr || pair[i].IsOf(use.use);
      if (here && !has_come) missing = begin + i;
      here = here && has_come;
    }
    const unsigned waiting = __ballot_sync(0xffffffffu, !here);
    if (waiting != 0) {
      missing = __shfl_sync(0xffffffffu, missing, __ffs(static_cast<int>(waiting)) - 1);
    }
    return waiting == 0;
  };
  (void)WarpWaitUntil(ready, missing, WaitStage::kCombine, args.wait);
#pragma unroll
  for (int i = 0; i < kRanks; ++i) {
    if (from[i] == nullptr || !pair[i].IsOf(use.use)) continue;
    Vector16<Element>::MultiplyAdd(pair[i].Vector(), 1.0f, sum);
  }
}

// Makes this rank's own tokens, whose partial rows come as packets.
template <typename Element>
__device__ void ReducePackets(const CudaCombineArgs& args, const AreaUse& use,
                              std::int64_t num_vectors) {
  constexpr int kRanksAtOnce = 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_chunks = PacketChunks(num_vectors);
  const int num_warps = static_cast<int>(gridDim.x * (blockDim.x / kWarpSize));
  // The last warps first: the first ones push.
  const int warp = num_warps - 1 - GridWarp(static_cast<int>(gridDim.x));
  for (int i = warp; i < static_cast<int>(args.num_tokens) * num_chunks; i += num_warps) {
    const std::int64_t token = i / num_chunks;
    const std::int64_t piece = std::int64_t{i % num_chunks} * kWarpSize + lane;
    const bool inside = piece < num_vectors;
    const int position =
        lane < args.area.num_ranks ? args.send_position[token * args.area.num_ranks + lane] : -1;
    const int own = __shfl_sync(0xffffffffu, position, args.area.rank);
    PieceSum<Element> total;
    if (own >= 0) {
      const std::int64_t row = std::int64_t{args.recv_base[args.area.rank]} + own;
      total.AddExperts(args, LoadExpert(args, use, row), num_vectors, piece, inside);
    }
    for (int begin = 0; begin < args.area.num_ranks; begin += kRanksAtOnce) {
      AddPartials<Element, kRanksAtOnce>(args, use, position, begin, piece, inside, total.sum);
    }
    if (inside) {
      static_cast<uint4*>(args.out)[token * num_vectors + piece] =
          Vector16<Element>::Pack(total.sum);
    }
  }
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_PACKETS_CUH_
