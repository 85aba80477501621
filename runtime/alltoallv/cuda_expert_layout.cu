// Expert-major order of the received rows, and the gather that puts them there.
//
// One block an expert scans the received ids once: ids below its own give where its rows begin, its
// own give their places. The order is by expert, then source, token and k: the same every time.
#include <cuda_fp8.h>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/device_limits.h"
#include "runtime/base/cuda_status.h"

namespace epserve::runtime {
namespace {

constexpr int kLayoutThreads = 512;
constexpr int kLayoutWarps = kLayoutThreads / kWarpSize;

__device__ std::int64_t RowsFrom(const std::int32_t* recv_rows, const std::byte* area,
                                 const AreaView& view, int source) {
  return recv_rows[source] >= 0 ? recv_rows[source] : CountedRows(area, view, source);
}

// Sum over the block, the same in every thread.
__device__ int BlockSum(int value, int* scratch) {
  const int warp_sum = __reduce_add_sync(0xffffffffu, value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = warp_sum;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kLayoutWarps; ++w) sum += scratch[w];
  return sum;
}

// How many threads before this one have `flag` set, and in *total how many have it at all.
__device__ int BlockRank(bool flag, int* scratch, int* total) {
  const unsigned ballot = __ballot_sync(0xffffffffu, flag);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  __syncthreads();
  if (lane == 0) scratch[warp] = __popc(ballot);
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kLayoutWarps; ++w) {
    before += w < warp ? scratch[w] : 0;
    all += scratch[w];
  }
  *total = all;
  return before + __popc(ballot & ((1u << lane) - 1u));
}

__device__ void StoreOffset(const ExpertLayoutArgs& args, int expert, int first_row) {
  args.expert_offset[expert] = first_row;
  if (args.host_expert_offset != nullptr) args.host_expert_offset[expert] = first_row;
}

// The experts of a source's rows in their order, K a row and as many of nobody as make that a power
// of two: threads find their row without a division.
class Entries {
 public:
  static constexpr int kNone = -2;

  __device__ explicit Entries(const ExpertLayoutArgs& args) : args_(args) {
    while ((1 << shift_) < args.topk) ++shift_;
  }

  __device__ std::int64_t Of(std::int64_t rows) const { return rows << shift_; }

  __device__ int Id(const std::byte* own, std::int64_t base, std::int64_t entry) const {
    const int k = K(entry);
    if (k >= args_.topk) return kNone;
    return ExpertNotes(own, args_.area.layout, base + (entry >> shift_))[k];
  }

  // Of an entry that is somebody's: where it is in expert_index.
  __device__ std::int64_t Place(std::int64_t base, std::int64_t entry) const {
    return (base + (entry >> shift_)) * args_.topk + K(entry);
  }

 private:
  __device__ int K(std::int64_t entry) const {
    return static_cast<int>(entry) & ((1 << shift_) - 1);
  }

  const ExpertLayoutArgs& args_;
  int shift_ = 0;
};

__global__ void __launch_bounds__(kLayoutThreads)
    ExpertLayoutKernel(const __grid_constant__ ExpertLayoutArgs args) {
  __shared__ int scratch[kLayoutWarps];
  const int expert = static_cast<int>(blockIdx.x);  // num_local_experts: the block of the total
  if (__syncthreads_or(GaveUp(args.wait)) !=
      0) {  // A late peer may still be writing what is read here.
    if (threadIdx.x == 0) StoreOffset(args, expert, 0);
    return;
  }
  const AreaUse use = CurrentUse(args.area, 1);  // the dispatch counter has moved on already
  const std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const Entries entries(args);
  int below = 0;
  for (int s = 0; s < args.area.num_ranks; ++s) {
    const std::int64_t count = entries.Of(RowsFrom(args.recv_rows, own, args.area, s));
    for (std::int64_t i = threadIdx.x; i < count; i += kLayoutThreads) {
      const int id = entries.Id(own, args.recv_base[s], i);
      below += id >= 0 && id < expert ? 1 : 0;
    }
  }
  int next = BlockSum(below, scratch);
  if (threadIdx.x == 0) StoreOffset(args, expert, next);
  for (int s = 0; s < args.area.num_ranks; ++s) {
    const std::int64_t count = entries.Of(RowsFrom(args.recv_rows, own, args.area, s));
    for (std::int64_t start = 0; start < count; start += kLayoutThreads) {
      const std::int64_t i = start + threadIdx.x;
      const int id = i < count ? entries.Id(own, args.recv_base[s], i) : Entries::kNone;
      int total = 0;
      const int rank = BlockRank(id == expert, scratch, &total);
      if (id == expert && expert < args.num_local_experts) {
        args.expert_index[entries.Place(args.recv_base[s], i)] = next + rank;
      }
      if (id == -1 && expert == args.num_local_experts) {
        args.expert_index[entries.Place(args.recv_base[s], i)] = -1;
      }
      next += total;
    }
  }
}

__device__ uint4 CastFromFp8(const uint2& packed, float scale) {
  uint4 result;
  auto* out = reinterpret_cast<__nv_bfloat162*>(&result);
  const auto* in = reinterpret_cast<const __nv_fp8x2_storage_t*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 h(__nv_cvt_fp8x2_to_halfraw2(in[i], __NV_E4M3));
    const float2 f = __half22float2(h);
    out[i] = __floats2bfloat162_rn(f.x * scale, f.y * scale);
  }
  return result;
}

// A warp copies a piece of a row, whose loads are all on their way before the first store. Piece by
// piece the work goes round the blocks, so that the rows of a small batch keep every multiprocessor
// busy, too: a warp a row took 32 us more for one token of 14 KiB, and 84 us more for 128, on 4
// H200s.
constexpr int kPieceVectors = 4;  // a lane's, of 16 bytes
constexpr int kPiece = kPieceVectors * kWarpSize;

__global__ void __launch_bounds__(512) GatherKernel(const __grid_constant__ GatherArgs args) {
  // One lane's look, so that a warp stays together.
  if (__shfl_sync(0xffffffffu, GaveUp(args.wait) ? 1 : 0, 0) != 0) return;
  const AreaUse use = CurrentUse(args.area, 1);
  const AreaLayout& layout = args.area.layout;
  const std::byte* own = args.area.heap[args.area.rank] + use.byte_offset;
  const std::int64_t output_bytes = args.hidden * (args.dtype == DataType::kFp32 ? 4 : 2);
  const std::int64_t num_vectors = output_bytes / 16;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t pieces = (num_vectors + kPiece - 1) / kPiece;  // of a row
  const std::int64_t first =
      static_cast<std::int64_t>(threadIdx.x / kWarpSize) * gridDim.x + blockIdx.x;
  for (int s = 0; s < args.area.num_ranks; ++s) {
    const std::int64_t end = RowsFrom(args.recv_rows, own, args.area, s) * pieces;
    for (std::int64_t piece = first; piece < end;
         piece += static_cast<std::int64_t>(gridDim.x) * warps) {
      const std::int64_t row = args.recv_base[s] + piece / pieces;
      const bool local = s == args.area.rank;  // Never sent: its row is still in x.
      const std::int64_t token =
          local ? reinterpret_cast<const std::int32_t*>(own + layout.source_token)[row] : 0;
      const bool packed = !local && args.payload == RowPayload::kFp8;
      const std::byte* from = local
                                  ? static_cast<const std::byte*>(args.x) + token * output_bytes
                                  : own + layout.rows + row * (packed ? args.hidden : output_bytes);
      const auto* scales = RowScales(own, layout, row);
      const int index = lane < args.topk ? args.expert_index[row * args.topk + lane] : -1;
      // The whole warp takes part in the shuffles, also where a row has fewer vectors than lanes.
      const std::int64_t start = piece % pieces * kPiece + lane;
      uint4 value[kPieceVectors];
#pragma unroll
      for (int u = 0; u < kPieceVectors; ++u) {
        const std::int64_t v = start + u * kWarpSize;
        value[u] = make_uint4(0, 0, 0, 0);
        if (v < num_vectors) {
          value[u] = packed ? CastFromFp8(reinterpret_cast<const uint2*>(from)[v],
                                          scales[v * 8 / kFp8GroupElements])
                            : reinterpret_cast<const uint4*>(from)[v];
        }
      }
      for (int k = 0; k < args.topk; ++k) {
        const int to = __shfl_sync(0xffffffffu, index, k);
        if (to < 0) continue;
        uint4* const row_to = static_cast<uint4*>(args.expert_inputs) + to * num_vectors;
#pragma unroll
        for (int u = 0; u < kPieceVectors; ++u) {
          const std::int64_t v = start + u * kWarpSize;
          if (v < num_vectors) row_to[v] = value[u];
        }
      }
    }
  }
}

}  // namespace

absl::Status LoadExpertLayoutKernels() {
  EPS_RETURN_IF_ERROR(LoadKernel(ExpertLayoutKernel));
  return LoadKernel(GatherKernel);
}

absl::Status LaunchExpertLayout(const ExpertLayoutArgs& args, cudaStream_t stream) {
  if (args.num_local_experts < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("expert layout: num_local_experts ", args.num_local_experts, " is negative"));
  }
  ExpertLayoutKernel<<<args.num_local_experts + 1, kLayoutThreads, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

absl::Status LaunchGather(const GatherArgs& args, cudaStream_t stream) {
  if (args.num_blocks < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather: num_blocks ", args.num_blocks, " must be at least 1"));
  }
  EPS_RETURN_IF_ERROR(CheckRowBytes("gather", args.hidden, args.dtype));
  GatherKernel<<<args.num_blocks, 512, 0, stream>>>(args);
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
