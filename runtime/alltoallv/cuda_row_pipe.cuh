// A warp's stream of weighted row sums with many loads on their way: out = sum of weight * source.
//
// Pieces of the rows are copied asynchronously into the warp's ring in shared memory, across the
// borders of rows, so that a warp pays the memory's latency once and not once a row: few blocks
// then keep enough bytes in flight to fill the link. Each lane copies what it adds itself, so a
// lane waits for its own copies alone and no two lanes share a byte of the ring.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_PIPE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_PIPE_CUH_

#include "runtime/alltoallv/cuda_device.cuh"

namespace epserve::runtime {

// 16 warps x 6 stages x 2 KiB: 192 KiB in flight on a multiprocessor, whose shared memory that and
// the lists fill. At 40 GB/s a block, which 24 blocks need, the memory's latency asks for 40 KiB.
inline constexpr int kPipeWarps = 16;
inline constexpr int kPipeStages = 6;
inline constexpr int kPipeVectors = 4;  // a lane's in a stage, 16 bytes each
inline constexpr int kPipeRows = 8;  // open at a time: one a stage, one being opened; a power of 2
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
  uint4 piece[kPipeWarps][kPipeStages][kPipeVectors][32];
  PipeRow row[kPipeWarps][kPipeRows];
};
static_assert(sizeof(PipeShared) <= 227 * 1024, "a block's limit on sm_90");

enum class PipeNext { kRow, kNotYet, kEnd };

__device__ inline void CopyAsync(uint4* shared, const uint4* global) {
  // .cg: through L2 alone, where a peer's stores land; L1 may hold older bytes.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kPending` of this thread's latest groups are still on their way.
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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

// `rows->Next(PipeRow* row, bool wait)`, called by the whole warp, fills the row and ends with
// __syncwarp(). It may answer kNotYet only where `wait` is false: the pipe then has sums to add in
// the meantime.
template <typename Element, typename Rows>
__device__ void RunPipe(Rows* rows, int num_vectors, std::uint64_t use, PipeShared* shared) {
  using V = Vector16<Element>;
  constexpr int kPieceVectors = 32 * kPipeVectors;
  const int lane = static_cast<int>(threadIdx.x % 32);
  auto& ring = shared->piece[threadIdx.x / 32];
  PipeRow* list = shared->row[threadIdx.x / 32];
  const int num_pieces = (num_vectors + kPieceVectors - 1) / kPieceVectors;
  PipeCursor copied, added;
  int copy_stage = 0, add_stage = 0, in_flight = 0;
  bool open = false, ended = false;
  std::uint64_t* written_flag = nullptr;  // of the last whole row, yet to be raised
  float sum[kPipeVectors][V::kElements] = {};
  for (;;) {
    if (!open && !ended && in_flight < kPipeStages) {
      const PipeNext next = rows->Next(&list[copied.row % kPipeRows], in_flight == 0);
      open = next == PipeNext::kRow;
      ended = next == PipeNext::kEnd;
    }
    if (open && in_flight < kPipeStages) {
      const PipeRow& row = list[copied.row % kPipeRows];
      if (row.num_sources > 0) {
        const uint4* from = row.source[copied.source];
#pragma unroll
        for (int u = 0; u < kPipeVectors; ++u) {
          const int v = copied.piece * kPieceVectors + u * 32 + lane;
          if (v < num_vectors) CopyAsync(&ring[copy_stage][u][lane], from + v);
        }
      }
      CommitCopies();
      open = !copied.Advance(row.num_sources, num_pieces);
      copy_stage = copy_stage + 1 == kPipeStages ? 0 : copy_stage + 1;
      ++in_flight;
      continue;
    }
    if (in_flight == 0) {
      if (ended) break;
      continue;
    }
    if (in_flight == kPipeStages) {
      WaitForCopies<kPipeStages - 1>();
    } else {
      WaitForCopies<0>();
    }
    const PipeRow& row = list[added.row % kPipeRows];
    if (row.num_sources > 0) {
      const float weight = row.weight[added.source];
#pragma unroll
      for (int u = 0; u < kPipeVectors; ++u) {
        V::MultiplyAdd(ring[add_stage][u][lane], weight, sum[u]);
      }
    }
    add_stage = add_stage + 1 == kPipeStages ? 0 : add_stage + 1;
    --in_flight;
    const int piece = added.piece;
    const bool row_done = added.Advance(row.num_sources, num_pieces);
    if (added.source != 0) continue;
    // The flag of the row before: its stores have had this piece's time to arrive, so that the
    // release does not wait for them.
    if (written_flag != nullptr) {
      __syncwarp();  // Orders every lane's stores before lane 0's release.
      if (lane == 0) PublishRow(written_flag, use);
      written_flag = nullptr;
    }
#pragma unroll
    for (int u = 0; u < kPipeVectors; ++u) {
      const int v = piece * kPieceVectors + u * 32 + lane;
      if (v < num_vectors) row.out[v] = V::Pack(sum[u]);
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) sum[u][e] = 0.0f;
    }
    if (row_done) written_flag = row.flag;
  }
  __syncwarp();
  if (written_flag != nullptr && lane == 0) PublishRow(written_flag, use);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_PIPE_CUH_
