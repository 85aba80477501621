// Combine of rows that came as lines: their sums go back as lines, and source and receiver both
// know that. Warps each take a unit of a row, so that many multiprocessors share it; the first
// blocks push, and the others add up what comes; none waits for another of its rank.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_LINES_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_LINES_CUH_

#include "runtime/alltoallv/cuda_combine_device.cuh"
#include "runtime/alltoallv/cuda_line_device.cuh"

namespace epserve::runtime {

// lines_from[r] = rows that rank r sent here as lines, by the threads below R; such a rank has no
// others. After LoadRowsFrom() by the same threads; a __syncthreads() comes after.
//
// The head's number of its use is not looked at: it is this use's. The dispatch before ended only
// once it had found that number in every source's head (ReceiveFrom()'s first warp), or its wait
// gave up, and then GaveUp() keeps all from being sent that would be made of this. The source
// writes its next head here in the area's next use, which it begins after it has ended the dispatch
// of the other area's, and so after this combine.
__device__ inline void LoadLinesFrom(const CudaCombineArgs& args, const AreaUse& use,
                                     int* lines_from, int* rows_from) {
  const auto source = static_cast<int>(threadIdx.x);
  if (source >= args.area.num_ranks) return;
  lines_from[source] = 0;
  if (args.area.layout.line_capacity == 0 || source == args.area.rank) return;
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const LineHead head = LineHead::Of(LoadLane(HeadOf(own, args.area.layout, source)).data);
  if (head.as_lines == 0) return;
  lines_from[source] = RowsOf(head, args.area.layout);
  rows_from[source] = 0;
}

// How a row is cut into units: a lane has kParts parts of one, of as many of the warp's lines, and
// those of kAtOnce experts' rows are on their way together, eight loads a lane in both cases.
struct WideUnits {
  static constexpr int kParts = 2;
  static constexpr int kAtOnce = 4;
};
// Where the rows are so few that no warp has two units, a row is done sooner by twice the warps. On
// 4 H200s, top-8, dispatch and combine of one token a rank took 14.6 us for 15.7, but combine of
// 128 tokens 33 for 29.
struct NarrowUnits {
  static constexpr int kParts = 1;
  static constexpr int kAtOnce = 8;
};

template <typename Units>
inline constexpr int kLinesOf = Units::kParts* kLinesAtOnce;  // a unit's

// A lane's parts of a unit of a row, and their sum over experts' rows, in the lanes' order.
template <typename Element, typename Units>
struct UnitSum {
  using V = Vector16<Element>;
  static constexpr int kParts = Units::kParts;
  static constexpr int kAtOnce = Units::kAtOnce;

  __device__ UnitSum(const PlainLines& lines, int unit) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int line = unit * kLinesOf<Units> + p * kLinesAtOnce + LineOfWarp();
      vector[p] = lines.VectorAt(line, LaneOfLine());
      if (!IsTail()) continue;
      const LineTail tail = lines.TailAt(line);
      vector[p] = tail.vector;
      if (tail.vector >= 0) half = tail.half;
    }
  }

  // Called by the whole warp; lane k holds expert k.
  __device__ void AddExperts(const CudaCombineArgs& args, const ListedExpert& expert,
                             std::int64_t num_vectors) {
    const auto* rows = static_cast<const uint4*>(args.expert_rows);
    unsigned left = __ballot_sync(0xffffffffu, expert.index >= 0);
#pragma unroll 1
    while (left != 0) {
      const int count = __popc(left);
      uint4 piece[kAtOnce][kParts];
      float weight[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int lane = i < count ? __ffs(static_cast<int>(left)) - 1 : 0;
        left &= left - 1;
        const std::int64_t row = __shfl_sync(0xffffffffu, expert.index, lane);
        weight[i] = __shfl_sync(0xffffffffu, expert.weight, lane);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          if (i >= count || vector[p] < 0) continue;
          piece[i][p] = __ldcg(rows + row * num_vectors + vector[p]);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          if (i >= count || vector[p] < 0) continue;
          V::MultiplyAdd(HalfOf(piece[i][p], half), weight[i], sum[p]);
        }
      }
    }
  }

  // Puts the lane's parts of the sum into a row.
  __device__ void Store(uint4* row) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (vector[p] < 0) continue;
      const uint4 piece = V::Pack(sum[p]);
      if (IsTail()) {
        reinterpret_cast<uint2*>(row + vector[p])[half] = make_uint2(piece.x, piece.y);
      } else {
        row[vector[p]] = piece;
      }
    }
  }

  int vector[kParts];  // -1: none
  int half = 0;        // of a tail, of each: its lines are as many apart
  float sum[kParts][V::kElements] = {};
};

// A warp's units of the rows that one peer sent as lines. The first one's experts are on their way
// before it is known whether there is one.
template <typename Element, typename Units>
class LinePushes {
 public:
  using S = UnitSum<Element, Units>;

  __device__ LinePushes(const CudaCombineArgs& args, const AreaUse& use, std::int64_t num_vectors)
      : args_(args),
        use_(use),
        num_vectors_(num_vectors),
        lines_(static_cast<int>(num_vectors), 0),
        num_units_(CeilDivide(lines_.count(), kLinesOf<Units>)) {
    const int num_peers = args.area.num_ranks - 1;
    if (num_peers == 0 || args.area.layout.line_capacity == 0) return;
    const int warp = GridWarp(args.push_blocks);
    const int num_warps = args.push_blocks * static_cast<int>(blockDim.x / kWarpSize);
    const int turn = warp % num_peers;
    source_ = (args.area.rank + 1 + turn) % args.area.num_ranks;
    first_ = warp / num_peers;
    stride_ = (num_warps - turn + num_peers - 1) / num_peers;
    expert_ = ExpertOf(first_);
  }

  __device__ void Push(const int* lines_from) const {
    if (source_ < 0) return;
    const int count = lines_from[source_] * num_units_;
    std::byte* there = args_.area.heap[source_] + use_.byte_offset;
    ListedExpert expert = expert_;
#pragma unroll 1
    for (int i = first_; i < count; i += stride_) {
      const int row = i / num_units_;
      const int of_row = i - row * num_units_;
      const ListedExpert next = ExpertOf(i + stride_);
      S unit(lines_, of_row);
      unit.AddExperts(args_, expert, num_vectors_);
      expert = next;
      std::byte* partial = LinePartial(there, args_.area.layout, args_.area.rank, row);
      const int first_line = of_row * kLinesOf<Units> + LineOfWarp();
#pragma unroll
      for (int p = 0; p < Units::kParts; ++p) {
        LaneData data = LaneDataOf(Vector16<Element>::Pack(unit.sum[p]));
        if (IsTail()) data.use = use_.use;
        const int line = first_line + p * kLinesAtOnce;
        StoreLine(line < lines_.count(), partial + line * kLineBytes, data);
      }
    }
  }

 private:
  __device__ ListedExpert ExpertOf(int i) const {
    const int row = i / num_units_;
    if (row >= args_.area.layout.line_capacity) return {};
    return LoadExpert(args_, use_, std::int64_t{args_.recv_base[source_]} + row);
  }

  const CudaCombineArgs& args_;
  const AreaUse& use_;
  std::int64_t num_vectors_;
  PlainLines lines_;
  int num_units_;
  int source_ = -1;  // none: nobody sends lines
  int first_ = 0;
  int stride_ = 1;
  ListedExpert expert_;
};

// Adds the partial rows of up to kPeers peers, the one of place `begin` in their order and those
// after it, when all have come. Lane r holds in `position` the token's place among the rows to rank
// r, -1: none. A row whose wait gave up is left out.
template <typename Element, int kPeers, typename Units>
__device__ void AddPartials(const CudaCombineArgs& args, const AreaUse& use,
                            const PlainLines& lines, int position, int begin, int first_line,
                            UnitSum<Element, Units>* unit) {
  constexpr int kParts = Units::kParts;
  std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const std::byte* from[kPeers];
  unsigned missing[kPeers] = {};  // bit p: part p has not come
  unsigned wanted[kPeers];
  const auto rank_of = [&](int i) { return begin + i + (begin + i >= args.area.rank ? 1 : 0); };
#pragma unroll
  for (int i = 0; i < kPeers; ++i) {
    const int rank = rank_of(i);
    const int row = __shfl_sync(0xffffffffu, position, rank % kWarpSize);
    const bool comes = rank < args.area.num_ranks && row >= 0;
    from[i] = LinePartial(own, args.area.layout, comes ? rank : 0, comes ? row : 0) +
              first_line * kLineBytes;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (comes && first_line + p * kLinesAtOnce < lines.count()) missing[i] |= 1u << p;
    }
    wanted[i] = missing[i];
  }
  LaneData data[kPeers][kParts];
  int awaited = rank_of(0);
  const auto ready = [&] {
#pragma unroll
    for (int i = 0; i < kPeers; ++i) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        LoadLine((missing[i] >> p & 1u) != 0, from[i] + p * kLinesAtOnce * kLineBytes, &data[i][p]);
      }
    }
    unsigned waiting = 0;
#pragma unroll
    for (int i = 0; i < kPeers; ++i) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (HasCome((missing[i] >> p & 1u) != 0, data[i][p], use.use)) missing[i] &= ~(1u << p);
      }
      const unsigned of_rank = __ballot_sync(0xffffffffu, missing[i] != 0);
      if (waiting == 0 && of_rank != 0) awaited = rank_of(i);
      waiting |= of_rank;
    }
    return waiting == 0;
  };
  (void)WarpWaitUntil(ready, awaited, WaitStage::kCombine, args.wait);
#pragma unroll
  for (int i = 0; i < kPeers; ++i) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (((wanted[i] & ~missing[i]) >> p & 1u) == 0) continue;
      Vector16<Element>::MultiplyAdd(VectorOf(data[i][p]), 1.0f, unit->sum[p]);
    }
  }
}

// Makes this rank's own tokens, whose partial rows come as lines, as one of `num_warps` warps that
// do. What the next unit needs to begin is on its way while the present one waits for its lines.
template <typename Element, typename Units>
__device__ void ReduceLines(const CudaCombineArgs& args, const AreaUse& use,
                            std::int64_t num_vectors, int warp, int num_warps) {
  constexpr int kPeersAtOnce = 3;
  using S = UnitSum<Element, Units>;
  const int num_ranks = args.area.num_ranks;
  const PlainLines lines(static_cast<int>(num_vectors), 0);
  const int num_units = CeilDivide(lines.count(), kLinesOf<Units>);
  const int count = static_cast<int>(args.num_tokens) * num_units;
  const auto load_position = [&](int i) {
    const bool has_place = LaneOfWarp() < num_ranks && i < count;
    return has_place ? args.send_position[i / num_units * num_ranks + LaneOfWarp()] : -1;
  };
  const auto load_expert = [&](int position) {
    const int own = __shfl_sync(0xffffffffu, position, args.area.rank);
    if (own < 0) return ListedExpert{};
    return LoadExpert(args, use, std::int64_t{args.recv_base[args.area.rank]} + own);
  };
  int position = load_position(warp);
  ListedExpert expert = load_expert(position);
#pragma unroll 1
  for (int i = warp; i < count; i += num_warps) {
    const int next_position = load_position(i + num_warps);
    const int token = i / num_units;
    const int of_row = i - token * num_units;
    S unit(lines, of_row);
    unit.AddExperts(args, expert, num_vectors);
    expert = load_expert(next_position);
#pragma unroll 1
    for (int begin = 0; begin < num_ranks - 1; begin += kPeersAtOnce) {
      AddPartials<Element, kPeersAtOnce, Units>(args, use, lines, position, begin,
                                                of_row * kLinesOf<Units> + LineOfWarp(), &unit);
    }
    position = next_position;
    unit.Store(static_cast<uint4*>(args.out) + token * num_vectors);
  }
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_COMBINE_LINES_CUH_
