// A warp's stream of weighted row sums with many loads on their way: out = sum of weight * source.
//
// Pieces of the rows are bulk-copied into the warp's ring in shared memory, across the borders of
// rows, so that a warp pays the memory's latency once and not once a row, and spends one
// instruction on two KiB of loads. No warp waits for another.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_PIPE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_PIPE_CUH_

#include "runtime/alltoallv/cuda_device.cuh"

namespace epserve::runtime {

// 16 warps x 3 stages x 4 KiB: 192 KiB in flight on a multiprocessor, whose shared memory that and
// the lists fill. Fewer, longer steps pay: 24 blocks took 462 us with these, 597 us with 6 stages
// of 2 KiB, and 490 us with loads to registers and no ring (two H100s, 4096 x 7168, top-8).
inline constexpr int kPipeWarps = 16;
inline constexpr int kPipeStages = 3;
inline constexpr int kPipeVectors = 8;  // a lane's in a stage, 16 bytes each
inline constexpr int kPipeRows = 4;  // open at a time: one a stage, one being opened; a power of 2
// Rows whose flags one fence covers: a fence holds up the whole multiprocessor's stores (57 of the
// 366 us that two experts a row took), and a flag held back holds up the row's reduction.
inline constexpr int kFlagsAtOnce = 2;
static_assert(kPipeRows >= kPipeStages + 1);

// One sum. `flag` is raised to the pipe's `use` once `out` has been written; null: none.
struct PipeRow {
  const uint4* source[kMaxCudaTopk];
  float weight[kMaxCudaTopk];
  uint4* out;
  std::uint64_t* flag;
  int num_sources;
};

struct PipeShared {
  alignas(128) uint4 piece[kPipeWarps][kPipeStages][kPipeVectors][32];
  std::uint64_t full[kPipeWarps][kPipeStages];  // mbarriers: a stage's piece has come
  PipeRow row[kPipeWarps][kPipeRows];
};
static_assert(sizeof(PipeShared) <= 227 * 1024, "a block's limit on sm_90");

enum class PipeNext { kRow, kNotYet, kEnd };

__device__ inline unsigned SharedAddress(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Called by the warp whose barriers they are.
__device__ inline void InitBarriers(std::uint64_t* barriers, int count) {
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < count; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barriers + i))
                   : "memory");
    }
    // The copy engine, which completes on the barriers, sees them initialised.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();
}

// Called by one thread: `bytes`, a multiple of 16, complete the barrier's phase when they have
// come. 0: it is complete at once.
__device__ inline void CopyBulk(void* shared, const void* global, unsigned bytes,
                                std::uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
  if (bytes == 0) return;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// Waits for this multiprocessor's own copy, which needs no peer and always comes.
__device__ inline void WaitForBarrier(std::uint64_t* barrier, unsigned parity) {
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p;"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
}

// Where a side of the pipe stands: at source s of piece p of the n-th row.
struct PipeCursor {
  int row = 0;
  int piece = 0;
  int source = 0;

  // To the next step of a row; true where that was the row's last. A row without sources has one
  // empty step a piece.
  __device__ bool Advance(int num_sources, int num_pieces) {
    if (++source < num_sources) return false;
    source = 0;
    if (++piece < num_pieces) return false;
    piece = 0;
    ++row;
    return true;
  }
};

// Raises the first `count` flags. Called by the whole warp that wrote the rows.
__device__ inline void PublishRows(std::uint64_t* const (&flags)[kFlagsAtOnce], int count,
                                   std::uint64_t use) {
  __syncwarp();  // Orders every lane's stores before lane 0's fence.
  if (threadIdx.x % 32 != 0 || count == 0) return;
  // release: the rows first. system: the reader is another GPU. Pairs with the acquire in
  // WaitAtLeast and HaveArrived.
  cuda::atomic_thread_fence(cuda::memory_order_release, cuda::thread_scope_system);
#pragma unroll
  for (int i = 0; i < kFlagsAtOnce; ++i) {
    if (i >= count) break;
    cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*flags[i]).store(
        use, cuda::memory_order_relaxed);
  }
}

// `rows->Next(PipeRow* row, bool wait)`, called by the whole warp, fills the row and ends with
// __syncwarp(). It may answer kNotYet only where `wait` is false: the pipe then has sums to add in
// the meantime.
template <typename Element, typename Rows>
__device__ void RunPipe(Rows* rows, int num_vectors, std::uint64_t use, PipeShared* shared) {
  using V = Vector16<Element>;
  constexpr int kPieceVectors = 32 * kPipeVectors;
  const int lane = static_cast<int>(threadIdx.x % 32);
  auto& ring = shared->piece[threadIdx.x / 32];
  std::uint64_t* full = shared->full[threadIdx.x / 32];
  PipeRow* list = shared->row[threadIdx.x / 32];
  InitBarriers(full, kPipeStages);
  const int num_pieces = (num_vectors + kPieceVectors - 1) / kPieceVectors;
  PipeCursor copied, added;
  int copy_stage = 0, add_stage = 0, in_flight = 0;
  unsigned parity = 0;  // of the phase that the next piece to be added completes
  bool open = false, ended = false;
  std::uint64_t* written[kFlagsAtOnce] = {};  // flags of the last whole rows, yet to be raised
  int num_written = 0;
  float sum[kPipeVectors][V::kElements] = {};
  for (;;) {
    if (!open && !ended && in_flight < kPipeStages) {
      const PipeNext next = rows->Next(&list[copied.row % kPipeRows], in_flight == 0);
      open = next == PipeNext::kRow;
      ended = next == PipeNext::kEnd;
    }
    if (open && in_flight < kPipeStages) {
      const PipeRow& row = list[copied.row % kPipeRows];
      if (lane == 0) {
        const int begin = copied.piece * kPieceVectors;
        const int vectors = row.num_sources == 0 ? 0 : min(num_vectors - begin, kPieceVectors);
        const uint4* from = vectors == 0 ? nullptr : row.source[copied.source] + begin;
        CopyBulk(ring[copy_stage], from, static_cast<unsigned>(vectors) * 16, &full[copy_stage]);
      }
      open = !copied.Advance(row.num_sources, num_pieces);
      copy_stage = copy_stage + 1 == kPipeStages ? 0 : copy_stage + 1;
      ++in_flight;
      continue;
    }
    if (in_flight == 0) {
      if (ended) break;
      continue;
    }
    WaitForBarrier(&full[add_stage], parity);
    const PipeRow& row = list[added.row % kPipeRows];
    if (row.num_sources > 0) {
      const float weight = row.weight[added.source];
#pragma unroll
      for (int u = 0; u < kPipeVectors; ++u) {
        V::MultiplyAdd(ring[add_stage][u][lane], weight, sum[u]);
      }
    }
    __syncwarp();  // Every lane has read the stage before lane 0 has it overwritten.
    if (++add_stage == kPipeStages) {
      add_stage = 0;
      parity ^= 1;
    }
    --in_flight;
    const int piece = added.piece;
    const bool row_done = added.Advance(row.num_sources, num_pieces);
    if (added.source != 0) continue;
    // Flags of rows before: their stores have had this piece's time to arrive, so that the fence
    // does not wait for them.
    if (num_written == kFlagsAtOnce) {
      PublishRows(written, num_written, use);
      num_written = 0;
    }
#pragma unroll
    for (int u = 0; u < kPipeVectors; ++u) {
      const int v = piece * kPieceVectors + u * 32 + lane;
      if (v < num_vectors) row.out[v] = V::Pack(sum[u]);
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) sum[u][e] = 0.0f;
    }
    if (row_done && row.flag != nullptr) {
#pragma unroll
      for (int i = 0; i < kFlagsAtOnce; ++i) {
        if (i == num_written) written[i] = row.flag;
      }
      ++num_written;
    }
  }
  PublishRows(written, num_written, use);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_PIPE_CUH_
