// Combine for many rows: weighted sums at the speed of memory and link on few multiprocessors.
//
// A block's teams each have a ring of slots in shared memory, a slot for one piece of one row that
// is added, and two kinds of warps, so that neither waits for what the other can do meanwhile:
//   the feeder   walks the rows, waits for partial rows, and has the copy engine fill free slots;
//   the adders   add a full slot's piece to the sum in their registers, free the slot, and store a
//                sum that is complete where it goes.
// All of it goes through the ring in the order of the walk, so that sums are the same every time.
// One warp a block raises the flags of the rows that its teams have pushed.
#include "runtime/alltoallv/cuda_bulk_device.cuh"
#include "runtime/alltoallv/cuda_combine_device.cuh"
#include "runtime/alltoallv/cuda_combine_stream.h"
#include "runtime/alltoallv/cuda_row_turns.cuh"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

// On two H100s with 24 + 24 blocks, 4096 rows of 7168 bf16, top-8 of 256, and of 2048, of 128: 257
// and 101 us. Where the copy engine carried the sums too, in place from the ring: 260 and 130 us,
// and with five teams 266 and 147 us, with three of four adder warps 271 and 224 us.
constexpr int kTeams = 6;
constexpr int kAdderWarps = 2;  // a team's
constexpr int kAdders = kAdderWarps * kWarpSize;
constexpr int kThreads = (kTeams * (kAdderWarps + 1) + 1) * kWarpSize;
// A piece is at most 7 KiB, half a row of 7168 bf16: four threads that only made copies got one
// through every 40 ns, whether of 1 or of 4 KiB. An adder has its seven vectors' sums in registers.
constexpr int kThreadVectors = 7;
constexpr int kPieceVectors = kThreadVectors * kAdders;
constexpr int kRingBytes = 36 * 1024;  // a team's: five of the longest pieces
constexpr int kMaxSlots = 12;          // of a ring, where pieces are short
constexpr int kMaxSums = kMaxSlots;    // whose notes are kept; a sum takes a slot at least
constexpr int kFlagsAtOnce = 4;        // of a team, behind one fence
constexpr unsigned kFlagPauseNs = 100;

// What is in a slot.
struct alignas(8) SlotNote {
  float weight;
  std::uint16_t vectors;  // 0: the walk has ended
  bool has_data;          // else there was nothing to fetch
  bool ends_sum;
};

// Where a sum goes.
struct SumNote {
  uint4* out;           // null: the walk has ended
  std::uint64_t* flag;  // of the row that the sum completes; null: none
};

struct Ring {
  BulkBarrier filled[kMaxSlots];  // the feeder's arrival, and the copy's bytes
  BulkBarrier freed[kMaxSlots];   // all adders
  BulkBarrier summed[kMaxSums];   // all adders have stored the sum; only where rows are pushed
  BulkBarrier raised[kMaxSums];   // RaiseFlags() has read the note; only where rows are pushed
  SlotNote slot[kMaxSlots];
  SumNote sum[kMaxSums];
};

struct StreamShared {
  alignas(128) uint4 slots[kTeams][kRingBytes / sizeof(uint4)];
  Ring ring[kTeams];
  int rows_from[kMaxCudaRanks];  // that each rank sent to this one
  bool gave_up;
};
static_assert(sizeof(StreamShared) <= 227 * 1024, "a block's limit on sm_90");

// How rows are cut into pieces, all but the last of equal size.
struct Pieces {
  __device__ explicit Pieces(std::int64_t row_vectors)
      : row(static_cast<int>(row_vectors)),
        count((row + kPieceVectors - 1) / kPieceVectors),
        vectors((row + count - 1) / count),
        slot_vectors((vectors + 7) / 8 * 8),
        num_slots(min(kMaxSlots, kRingBytes / static_cast<int>(sizeof(uint4)) / slot_vectors)) {}

  __device__ int VectorsOf(int piece) const { return min(vectors, row - piece * vectors); }

  int row;
  int count;
  int vectors;       // of a piece
  int slot_vectors;  // from one slot to the next
  int num_slots;
};

// Goes round a ring.
struct Place {
  int index = 0;
  unsigned parity = 0;  // of the phase that this round completes

  __device__ Place After(int steps, int size) const {  // steps in [0, size]
    const bool wraps = index + steps >= size;
    return {wraps ? index + steps - size : index + steps, wraps ? parity ^ 1 : parity};
  }
};

// A lane's row in a sum, where it has one.
struct LaneRow {
  const uint4* row;
  float weight;
};

// The feeder's end of a ring. Called by the whole warp.
class Feed {
 public:
  // `pushes`: somebody raises the rows' flags.
  __device__ Feed(const Pieces& pieces, bool pushes, uint4* slots, Ring* ring)
      : pieces_(pieces), pushes_(pushes), slots_(slots), ring_(ring) {}

  // The sum that the next pieces belong to.
  __device__ void Begin(uint4* out, std::uint64_t* flag, int vectors) {
    note_.out = out;
    note_.flag = flag;
    vectors_ = vectors;
    if (pushes_) ring_->raised[sum_.index].Wait(sum_.parity ^ 1);
  }

  // Puts the pieces at `offset` of the rows of the lanes in `present`, if any, in the lanes' order;
  // of those not in `with_data`, nothing. Where enough slots are free, they are filled at once, by
  // the lanes together; else one by one.
  __device__ void Put(const LaneRow& mine, unsigned present, unsigned with_data, int offset,
                      bool ends_sum) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int place = __popc(present & ((1u << lane) - 1u));
    const int count = __popc(present);
    for (int done = 0; done < count;) {
      int filled = min(count - done, pieces_.num_slots);
      // Adders free slots in turn: when the last one is free, so are those before it. One answer
      // for the warp, whose lanes need not have looked at the same moment.
      const Place last = slot_.After(filled - 1, pieces_.num_slots);
      if (!__all_sync(0xffffffffu, ring_->freed[last.index].Test(last.parity ^ 1))) {
        filled = 1;
        ring_->freed[slot_.index].Wait(slot_.parity ^ 1);
      }
      const int ahead = place - done;
      if (((present >> lane) & 1u) != 0 && ahead >= 0 && ahead < filled) {
        const bool has_data = ((with_data >> lane) & 1u) != 0;
        Fill(slot_.After(ahead, pieces_.num_slots).index, has_data ? mine.row + offset : nullptr,
             mine.weight, ends_sum && place + 1 == count);
      }
      done += filled;
      slot_ = slot_.After(filled, pieces_.num_slots);
    }
    if (ends_sum && count > 0) sum_ = sum_.After(1, kMaxSums);
  }

  // A sum of nothing.
  __device__ void PutNothing() { Put({}, 1, 0, 0, true); }

  __device__ void End() {
    Begin(nullptr, nullptr, 0);
    PutNothing();
  }

 private:
  __device__ void Fill(int slot, const uint4* piece, float weight, bool ends_sum) {
    ring_->slot[slot] = {weight, static_cast<std::uint16_t>(vectors_), piece != nullptr, ends_sum};
    if (ends_sum) ring_->sum[sum_.index] = note_;
    BulkBarrier& filled = ring_->filled[slot];
    if (piece == nullptr) {
      filled.Arrive();
    } else {
      const unsigned bytes = static_cast<unsigned>(vectors_) * sizeof(uint4);
      filled.ArriveExpecting(bytes);
      filled.CopyIn(slots_ + slot * pieces_.slot_vectors, piece, bytes);
    }
  }

  const Pieces& pieces_;
  const bool pushes_;
  uint4* slots_;
  Ring* ring_;
  Place slot_;
  Place sum_;
  SumNote note_ = {};
  int vectors_ = 0;
};

__device__ LaneRow ExpertRow(const CudaCombineArgs& args, const ListedExpert& expert, int row) {
  const auto* rows = static_cast<const uint4*>(args.expert_rows);
  return {rows + expert.index * std::int64_t{row}, expert.weight};
}

// Feeds the rows that peers sent: each one's local experts, to its source. A row's experts are
// looked up when the row before is in the ring, whose adders have work for longer than that takes:
// a team that looked further ahead would hold on to rows which others could push.
__device__ void FeedPeerRows(const CudaCombineArgs& args, const AreaUse& use, const Pieces& pieces,
                             const int* rows_from, int first, int stride, Feed* feed) {
  const AreaLayout& layout = args.area.layout;
  PeerRowOrder order(args);
  order.Begin(rows_from);
  RowTurns turns(args.tickets, first, stride);
  for (int i = turns.Next(); !order.IsPastAll(i); i = turns.Next()) {
    const int source = order.SourceOf(i, order.ShiftOf(i, turns.stride()));
    if (!order.Has(i, source)) continue;
    const ListedExpert expert =
        LoadExpert(args, use, std::int64_t{args.recv_base[source]} + order.JOf(i));
    const LaneRow mine = ExpertRow(args, expert, pieces.row);
    const unsigned present = __ballot_sync(0xffffffffu, expert.index >= 0);
    std::byte* there = args.area.heap[source] + use.byte_offset;
    const std::int64_t partial = args.return_base[source] + order.JOf(i);
    auto* out = reinterpret_cast<uint4*>(there + layout.partials) + partial * pieces.row;
    auto* flag = reinterpret_cast<std::uint64_t*>(there + layout.row_flags) + partial;
    for (int p = 0; p < pieces.count; ++p) {
      const int offset = p * pieces.vectors;
      feed->Begin(out + offset, p + 1 == pieces.count ? flag : nullptr, pieces.VectorsOf(p));
      feed->Put(mine, present, present, offset, true);
      if (present == 0) feed->PutNothing();
    }
  }
  feed->End();
}

// Feeds this rank's own tokens: their local experts' rows, then the peers' partial rows as they
// come in.
__device__ void FeedOwnTokens(const CudaCombineArgs& args, const Pieces& pieces, OwnTokens* tokens,
                              Feed* feed) {
  while (!tokens->AtEnd()) {
    const LaneRow expert = ExpertRow(args, tokens->expert(), pieces.row);
    const unsigned experts = __ballot_sync(0xffffffffu, tokens->expert().index >= 0);
    const LaneRow partial = {tokens->Partial(pieces.row), 1.0f};
    const unsigned partials = __ballot_sync(0xffffffffu, tokens->HasPartial());
    auto* out = static_cast<uint4*>(args.out) + tokens->token() * pieces.row;
    // While the ring is still full of the token before: asking takes a trip to memory.
    unsigned arrived = __ballot_sync(0xffffffffu, tokens->PartialHasArrived());
    bool waited = arrived == partials;
    if (waited) FenceGlobalForBulk();
    for (int p = 0; p < pieces.count; ++p) {
      const int offset = p * pieces.vectors;
      feed->Begin(out + offset, nullptr, pieces.VectorsOf(p));
      feed->Put(expert, experts, experts, offset, partials == 0);
      if (!waited) {  // What a wait that gave up has not brought is left out.
        arrived = __ballot_sync(0xffffffffu, tokens->WaitForPartial());
        FenceGlobalForBulk();
        waited = true;
      }
      if (p == 0) tokens->Advance();
      feed->Put(partial, partials, arrived, offset, true);
      if ((experts | partials) == 0) feed->PutNothing();
    }
  }
  feed->End();
}

template <typename Element>
using Sums = float[kThreadVectors][Vector16<Element>::kElements];

// Adds the N vectors a thread of a piece, of which the last may be missing. All are loaded first.
template <typename Element, int kN>
__device__ void AddVectors(const uint4* piece, int left, float weight, Sums<Element>& sum) {
  uint4 vector[kN] = {};
#pragma unroll
  for (int u = 0; u < kN; ++u) {
    if (u + 1 < kN || u * kAdders < left) vector[u] = piece[u * kAdders];
  }
#pragma unroll
  for (int u = 0; u < kN; ++u) Vector16<Element>::MultiplyAdd(vector[u], weight, sum[u]);
}

// Chooses N, which is the same in the whole team, so that nothing but the last vector is asked for.
template <typename Element, int kN = kThreadVectors>
__device__ void AddPiece(const uint4* piece, int vectors, int adder, float weight,
                         Sums<Element>& sum) {
  if constexpr (kN > 1) {
    if (vectors <= (kN - 1) * kAdders) {
      return AddPiece<Element, kN - 1>(piece, vectors, adder, weight, sum);
    }
  }
  AddVectors<Element, kN>(piece + adder, vectors - adder, weight, sum);
}

// An adder: thread `adder` of its team.
template <typename Element>
__device__ void AddSlots(const Pieces& pieces, bool pushes, int adder, const uint4* slots,
                         Ring* ring) {
  Place slot, sum_place;
  Sums<Element> sum = {};
  for (;; slot = slot.After(1, pieces.num_slots)) {
    ring->filled[slot.index].Wait(slot.parity);
    const SlotNote note = ring->slot[slot.index];
    if (note.has_data) {
      const uint4* piece = slots + slot.index * pieces.slot_vectors;
      AddPiece<Element>(piece, note.vectors, adder, note.weight, sum);
    }
    uint4* const out = note.ends_sum ? ring->sum[sum_place.index].out : nullptr;
    // Slot and notes have been read; the copy engine's next write to the slot comes after.
    FenceSharedForBulk();
    ring->freed[slot.index].Arrive();
    if (!note.ends_sum) continue;
    const int left = note.vectors - adder;
#pragma unroll
    for (int u = 0; u < kThreadVectors; ++u) {
      if (u * kAdders < left) out[adder + u * kAdders] = Vector16<Element>::Pack(sum[u]);
#pragma unroll
      for (int e = 0; e < Vector16<Element>::kElements; ++e) sum[u][e] = 0.0f;
    }
    if (pushes) {
      ring->summed[sum_place.index].Arrive();  // Orders the stores; RaiseFlags() waits for it.
    }
    if (note.vectors == 0) return;
    sum_place = sum_place.After(1, kMaxSums);
  }
}

// Raises the flags of rows that are stored; lane t those of team t. Those that are ready together
// share a fence, which waits until all of the multiprocessor's stores have arrived.
__device__ void RaiseFlags(std::uint64_t use, Ring* rings) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  bool walks = lane < kTeams;
  Ring& ring = rings[walks ? lane : 0];
  Place sum;
  while (__any_sync(0xffffffffu, walks)) {
    std::uint64_t* flag[kFlagsAtOnce] = {};
    bool any = false;
#pragma unroll
    for (int i = 0; i < kFlagsAtOnce; ++i) {
      if (!walks || !ring.summed[sum.index].Test(sum.parity)) continue;
      const SumNote note = ring.sum[sum.index];
      ring.raised[sum.index].Arrive();
      flag[i] = note.flag;
      any |= note.flag != nullptr;
      walks = note.out != nullptr;
      sum = sum.After(1, kMaxSums);
    }
    if (!__any_sync(0xffffffffu, any)) {
      __nanosleep(kFlagPauseNs);
      continue;
    }
    // release: the rows first, which the adders stored and whose arrival in `summed` made this
    // thread's past. system: the reader is another GPU. Pairs with the acquire in WaitAtLeast.
    cuda::atomic_thread_fence(cuda::memory_order_release, cuda::thread_scope_system);
#pragma unroll
    for (int i = 0; i < kFlagsAtOnce; ++i) {
      if (flag[i] == nullptr) continue;
      cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*flag[i]).store(
          use, cuda::memory_order_relaxed);
    }
  }
}

// All warps share it, because the lanes of one take turns at it.
__device__ void InitRings(StreamShared* shared) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int i = lane * kWarps + warp;
  if (i < kTeams * kMaxSlots) {
    Ring& ring = shared->ring[i / kMaxSlots];
    const int slot = i % kMaxSlots;
    ring.filled[slot].Init(1);
    ring.freed[slot].Init(kAdders);
    ring.summed[slot].Init(kAdders);
    ring.raised[slot].Init(1);
  }
  BulkBarrier::FenceInit();
}
static_assert(kMaxSums == kMaxSlots && kTeams * kMaxSlots <= kThreads);

template <typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    StreamCombineKernel(const __grid_constant__ CudaCombineArgs args) {
  extern __shared__ __align__(128) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<StreamShared*>(shared_bytes);
  const AreaUse use = BeginUse(args.area, 1);
  InitRings(&shared);
  LoadRowsFrom(args, use, shared.rows_from);
  if (threadIdx.x == 0) shared.gave_up = GaveUp(args.wait);
  __syncthreads();
  if (shared.gave_up) return;  // What would be sent is made of rows that never came.
  const Pieces pieces(args.hidden / Vector16<Element>::kElements);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int block = static_cast<int>(blockIdx.x);
  const bool pushes = block < args.push_blocks;
  if (warp < kTeams * kAdderWarps) {
    const int team = warp / kAdderWarps;
    AddSlots<Element>(pieces, pushes, static_cast<int>(threadIdx.x) % kAdders, shared.slots[team],
                      &shared.ring[team]);
    return;
  }
  const int team = warp - kTeams * kAdderWarps;
  if (team == kTeams) {
    if (pushes) RaiseFlags(use.use, shared.ring);
    return;
  }
  Feed feed(pieces, pushes, shared.slots[team], &shared.ring[team]);
  if (pushes) {
    FeedPeerRows(args, use, pieces, shared.rows_from, team * args.push_blocks + block,
                 args.push_blocks * kTeams, &feed);
  } else {
    OwnTokens tokens(args, use, std::int64_t{team} * args.reduce_blocks + block - args.push_blocks,
                     std::int64_t{args.reduce_blocks} * kTeams);
    FeedOwnTokens(args, pieces, &tokens, &feed);
  }
}

template <typename Element>
absl::Status Load() {
  EPS_RETURN_IF_ERROR(LoadKernel(StreamCombineKernel<Element>));
  EPS_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(StreamCombineKernel<Element>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                sizeof(StreamShared)));
  return absl::OkStatus();
}

}  // namespace

absl::Status LoadStreamCombineKernels() {
  EPS_RETURN_IF_ERROR(Load<__nv_bfloat16>());
  EPS_RETURN_IF_ERROR(Load<__half>());
  return Load<float>();
}

template <typename Element>
cudaError_t LaunchStreamCombine(const CudaCombineArgs& args, cudaStream_t stream) {
  StreamCombineKernel<Element>
      <<<args.push_blocks + args.reduce_blocks, kThreads, sizeof(StreamShared), stream>>>(args);
  return cudaGetLastError();
}

template cudaError_t LaunchStreamCombine<__nv_bfloat16>(const CudaCombineArgs&, cudaStream_t);
template cudaError_t LaunchStreamCombine<__half>(const CudaCombineArgs&, cudaStream_t);
template cudaError_t LaunchStreamCombine<float>(const CudaCombineArgs&, cudaStream_t);

}  // namespace epserve::runtime
