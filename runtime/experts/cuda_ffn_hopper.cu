// The grouped product on Hopper's Tensor cores.
//
// A persistent grid of clusters of two blocks. In a block one thread copies tiles of rows and of
// weights into a ring of stages, and two warpgroups multiply them, 64 rows each. The blocks of a
// cluster share what they have in common: tiles of the same weights (each copies half of them into
// both), or, for the last row tile of an expert, the same rows. The next tile's copies run while
// this tile is written.
//
// A tile may run past its expert's last row: what is read there changes nothing, and is not
// written. A warpgroup without rows multiplies nothing.
#include <cuda_fp8.h>

#include "absl/strings/str_cat.h"
#include "runtime/base/cuda_fp8.cuh"
#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_ffn_device.cuh"
#include "runtime/experts/cuda_ffn_hopper_device.cuh"
#include "runtime/experts/cuda_ffn_kernels.h"

namespace epserve::runtime {
namespace {

constexpr int kClusterBlocks = 2;
constexpr int kWarpgroup = 128;           // threads
constexpr int kMathWarps = 8;             // of two warpgroups
constexpr int kThreads = 3 * kWarpgroup;  // the first warpgroup copies
constexpr int kTileRows = 2 * kHopperRowBox;
constexpr int kStageK = 128;  // bytes of K in a stage: one swizzled row
constexpr int kBoxBytes = kHopperRowBox * kStageK;
constexpr int kRowsBytes = kTileRows * kStageK;
constexpr int kStoreBytes = 16 * 128;  // a warp's 16 rows of 64 columns, on their way out
// Of the 168 that a thread gets at entry: 128 * (40 + 2 * 232) = 384 * 168.
constexpr int kCopyRegisters = 40;
constexpr int kMathRegisters = 232;

constexpr int kTileColumns = 2 * kHopperWeightBox;
constexpr int kWeightHalf = kHopperWeightBox * kStageK;  // bytes
constexpr int kStageBytes = kRowsBytes + 2 * kWeightHalf;
constexpr int kStages = 4;
constexpr int kStoreOffset = kStages * kStageBytes;
constexpr int kBarrierOffset = kStoreOffset + kMathWarps * kStoreBytes;
constexpr int kSharedBytes = kBarrierOffset + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 * 1024);
constexpr int kAccumulators = kTileColumns / 2;  // a thread's, of 64 rows by 128 threads

// Elements of K in a stage.
template <DataType kWeights>
constexpr int kElements = kWeights == DataType::kFp8E4m3 ? kStageK : kStageK / 2;

// A place in the ring, and how often the ring has gone round.
struct RingPosition {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ void Advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Shared memory of one block, by address.
struct Ring {
  std::uint32_t base;
  __device__ std::uint32_t rows(int stage) const { return base + stage * kStageBytes; }
  __device__ std::uint32_t weights(int stage) const { return rows(stage) + kRowsBytes; }
  __device__ std::uint32_t store(int warp) const {
    return base + kStoreOffset + warp * kStoreBytes;
  }
  __device__ std::uint32_t full(int stage) const { return base + kBarrierOffset + stage * 8; }
  __device__ std::uint32_t empty(int stage) const { return full(kStages + stage); }
};

using TileWalk = FfnTileWalk<kTileRows, kTileColumns, kClusterBlocks>;

__device__ TileWalk WalkTiles(const FfnProductArgs& args, int block) {
  return {args.expert_offset,
          args.num_experts,
          args.max_rows,
          args.weight_rows,
          static_cast<int>(blockIdx.x) / kClusterBlocks,
          static_cast<int>(gridDim.x) / kClusterBlocks,
          block};
}

// One thread's work: fills the ring with every tile of this block. A stage that both blocks of the
// cluster have read may be overwritten, in both.
template <DataType kWeights>
__device__ void CopyTiles(const FfnProductArgs& args, const CUtensorMap* a, const CUtensorMap* w,
                          const Ring& ring) {
  const int block = static_cast<int>(ClusterRank());
  TileWalk walk = WalkTiles(args, block);
  RingPosition at;
  FfnTile tile;
  while (walk.Next(&tile)) {
    const int row_boxes = tile.end - tile.row > kHopperRowBox ? 2 : 1;
    const int weight_row = tile.expert * args.weight_rows + tile.column;
    const std::uint32_t bytes = row_boxes * kBoxBytes + 2 * kWeightHalf;
#pragma unroll 1
    for (int k = 0; k < args.k; k += kElements<kWeights>, at.Advance()) {
      WaitBarrier(ring.empty(at.stage), at.parity ^ 1);
      const std::uint32_t full = ring.full(at.stage);
      const std::uint32_t rows = ring.rows(at.stage);
      const std::uint32_t weights = ring.weights(at.stage);
      ArriveExpectBytes(full, bytes);
      if (tile.same_weight) {
        CopyBoxToBoth(weights + block * kWeightHalf, w, k, weight_row + block * kHopperWeightBox,
                      full);
        CopyBox(rows, a, k, tile.row, full);
        if (row_boxes == 2) CopyBox(rows + kBoxBytes, a, k, tile.row + kHopperRowBox, full);
      } else {
        CopyBox(weights, w, k, weight_row, full);
        CopyBox(weights + kWeightHalf, w, k, weight_row + kHopperWeightBox, full);
        if (block < row_boxes) {
          CopyBoxToBoth(rows + block * kBoxBytes, a, k, tile.row + block * kHopperRowBox, full);
        }
      }
    }
  }
}

// Tells both blocks' copying threads that this warp has read the stage.
__device__ void Release(const Ring& ring, int stage) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kClusterBlocks) ArriveInCluster(ring.empty(stage), lane);
}

// Four products of 32 bytes of K: one stage. The first overwrites where `first` is set.
template <DataType kWeights, int kCount>
__device__ void MultiplyStage(float (&d)[kCount], std::uint32_t rows, std::uint32_t weights,
                              bool first) {
  const std::uint64_t a = OperandDescriptor(rows);
  const std::uint64_t b = OperandDescriptor(weights);
  WgmmaFence();
#pragma unroll
  for (int i = 0; i < kStageK / 32; ++i) {
    const int accumulate = i > 0 || !first;
    if constexpr (kWeights == DataType::kBf16) {
      WgmmaBf16(d, a + 2 * i, b + 2 * i, accumulate);
    } else {
      WgmmaFp8(d, a + 2 * i, b + 2 * i, accumulate);
    }
  }
  WgmmaCommit();
}

__device__ void AccumulateBf16(const Ring& ring, int group, int k_end, RingPosition* at,
                               float (&d)[kAccumulators]) {
  int before = 0;
  for (int k = 0; k < k_end; k += kElements<DataType::kBf16>, at->Advance()) {
    WaitBarrier(ring.full(at->stage), at->parity);
    MultiplyStage<DataType::kBf16>(d, ring.rows(at->stage) + group * kBoxBytes,
                                   ring.weights(at->stage), k == 0);
    if (k > 0) {
      WgmmaWait<1>();  // One stage stays in flight, so that the Tensor cores never run dry.
      Release(ring, before);
    }
    before = at->stage;
  }
  WgmmaWait<0>();
  FenceAccumulators(d);
  Release(ring, before);
}

// The scales that one thread's accumulators of a stage take: of its two rows, and of the tile's two
// blocks of weights, which are gate's and up's, or the two halves of down's columns.
struct StageScales {
  float row[2];
  float weight[2];
};

template <FfnProduct kProduct>
class ScaleReader {
 public:
  __device__ ScaleReader(const FfnProductArgs& args, const FfnTile& tile, int row)
      : max_rows_(args.max_rows),
        k_blocks_((args.k + 127) / 128),
        row_(args.row_scales + min(row, args.max_rows - 1)),
        row8_(args.row_scales + min(row + 8, args.max_rows - 1)) {
    // A tile past the last block's columns is not written: any scale will do.
    const int block_pairs = (args.weight_rows + 255) / 256;
    const int blocks =
        kProduct == FfnProduct::kGateUp ? 2 * block_pairs : (args.weight_rows + 127) / 128;
    const int first = min(tile.column / 128, blocks - 1);
    const int second = min(tile.column / 128 + 1, blocks - 1);
    const std::int64_t expert = static_cast<std::int64_t>(tile.expert) * blocks;
    weight_[0] = args.weight_scales + (expert + first) * k_blocks_;
    weight_[1] = args.weight_scales + (expert + second) * k_blocks_;
  }
  __device__ StageScales Read(int k_block) const {
    const std::int64_t to = static_cast<std::int64_t>(k_block) * max_rows_;
    return {{__ldg(row_ + to), __ldg(row8_ + to)},
            {__ldg(weight_[0] + k_block), __ldg(weight_[1] + k_block)}};
  }
  __device__ int k_blocks() const { return k_blocks_; }

 private:
  const int max_rows_;
  const int k_blocks_;
  const float* const row_;
  const float* const row8_;
  const float* weight_[2];
};

// One stage: d += a * b^T, scaled; half the columns at a time, for want of registers. `scales` are
// the stage's, and become those of two stages on: the reads take longer than a stage's products.
template <FfnProduct kProduct>
__device__ void AccumulateStageFp8(const Ring& ring, int group, const ScaleReader<kProduct>& reader,
                                   int k_block, StageScales* scales, RingPosition* at,
                                   float (&d)[kAccumulators]) {
  const StageScales& s = *scales;
  WaitBarrier(ring.full(at->stage), at->parity);
  float scale[2][2];  // of the blocks of weights, of the rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float part[kAccumulators / 2];
    FenceAccumulators(part);
    MultiplyStage<DataType::kFp8E4m3>(part, ring.rows(at->stage) + group * kBoxBytes,
                                      ring.weights(at->stage) + half * kWeightHalf, true);
    if (half == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scale[i / 2][i % 2] = s.weight[i / 2] * s.row[i % 2];
      if (k_block + 2 < reader.k_blocks()) *scales = reader.Read(k_block + 2);
    }
    WgmmaWait<0>();
    FenceAccumulators(part);
    if (half == 1) Release(ring, at->stage);
#pragma unroll
    for (int i = 0; i < kAccumulators / 2; ++i) {
      const int block = kProduct == FfnProduct::kGateUp ? i / 4 % 2 : half;
      d[half * kAccumulators / 2 + i] += part[i] * scale[block][i / 2 % 2];
    }
  }
  at->Advance();
}

template <FfnProduct kProduct>
__device__ void AccumulateFp8(const Ring& ring, int group, const ScaleReader<kProduct>& reader,
                              RingPosition* at, float (&d)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) d[i] = 0.0f;
  const int k_blocks = reader.k_blocks();
  // Two sets, by name: one that moved to the other's place would be waited for.
  StageScales even = reader.Read(0);
  StageScales odd = k_blocks > 1 ? reader.Read(1) : even;
  for (int k = 0; k < k_blocks; k += 2) {
    AccumulateStageFp8(ring, group, reader, k, &even, at, d);
    if (k + 1 < k_blocks) AccumulateStageFp8(ring, group, reader, k + 1, &odd, at, d);
  }
}

// What 8 columns of out get, of this thread's row (half 0) or the one 8 below it (half 1).
template <FfnProduct kProduct>
__device__ std::uint32_t OutputPair(const float (&d)[kAccumulators], int columns8, int half) {
  if constexpr (kProduct == FfnProduct::kGateUp) {
    const int i = columns8 * 8 + half * 2;  // gate's; up's are the next 8 columns'
    return PackBf16(SwiGlu(d[i], d[i + 4]), SwiGlu(d[i + 1], d[i + 5]));
  } else {
    const int i = columns8 * 4 + half * 2;
    return PackBf16(d[i], d[i + 1]);
  }
}

// A warp's 16 rows of 128 bytes, from shared memory to their place, 16 bytes a lane. Chunks of 16
// bytes lie there swizzled against bank conflicts.
__device__ void CopyOut(const FfnProductArgs& args, std::uint32_t store, int row, int end,
                        int column, int element_bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int to_column = column + lane % 8 * (16 / element_bytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from_row = i * 4 + lane / 8;
    const int chunk = lane % 8 ^ (from_row & 7);
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(store + from_row * 128 + chunk * 16)
                 : "memory");
    if (row + from_row < end && to_column < args.out_columns) {
      const std::int64_t element =
          static_cast<std::int64_t>(row + from_row) * args.out_columns + to_column;
      static_cast<uint4*>(args.out)[element * element_bytes / 16] = v;
    }
  }
}

// Writes a warp's 16 rows, 64 columns at a time: through shared memory, so that a row's 128 bytes
// leave together.
template <FfnProduct kProduct>
__device__ void StoreTile(const float (&d)[kAccumulators], const FfnProductArgs& args,
                          std::uint32_t store, int row, int end, int column) {
  constexpr int kOutColumns8 = kAccumulators / (kProduct == FfnProduct::kGateUp ? 8 : 4);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int to_row = lane % 16;
#pragma unroll
  for (int pass = 0; pass < kOutColumns8 / 8; ++pass) {
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      const std::uint32_t matrices[4] = {OutputPair<kProduct>(d, pass * 8 + c, 0),
                                         OutputPair<kProduct>(d, pass * 8 + c, 1),
                                         OutputPair<kProduct>(d, pass * 8 + c + 1, 0),
                                         OutputPair<kProduct>(d, pass * 8 + c + 1, 1)};
      const int chunk = (c + lane / 16) ^ (to_row & 7);
      StoreMatrices(store + to_row * 128 + chunk * 16, matrices);
    }
    __syncwarp();
    CopyOut(args, store, row, end, column + pass * 64, 2);
    __syncwarp();
  }
}

// What comes between the fp8 products: SwiGLU, cast to e4m3 with one scale a row, for a tile is as
// wide as a scale's 128 columns. Writes a warp's 16 rows, as StoreTile does.
__device__ void StoreQuantizedTile(float (&d)[kAccumulators], const FfnProductArgs& args,
                                   std::uint32_t store, int row, int end, int column) {
  constexpr int kOutColumns8 = kAccumulators / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = 0.0f;
#pragma unroll
    for (int c = 0; c < kOutColumns8; ++c) {
      float* const v = d + c * 8 + half * 2;  // gate's; up's are the next 8 columns'
      v[0] = SwiGlu(v[0], v[4]);
      v[1] = SwiGlu(v[1], v[5]);
      // Columns past the last are another expert's weights' work.
      if (column + c * 8 < args.out_columns) {
        largest = fmaxf(largest, fmaxf(fabsf(v[0]), fabsf(v[1])));
      }
    }
    // Four lanes share a row.
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float scale = Fp8Scale(largest);
    inverse[half] = 1.0f / scale;
    const int to_row = row + half * 8 + lane / 4;
    // A cluster's last tile of columns may lie past them all.
    if (lane % 4 == 0 && to_row < end && column < args.out_columns) {
      args.out_scales[static_cast<std::int64_t>(column / 128) * args.max_rows + to_row] = scale;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int c = 0; c < kOutColumns8; ++c) {
      const float* const v = d + c * 8 + half * 2;
      const std::uint16_t pair = __nv_cvt_float2_to_fp8x2(
          make_float2(v[0] * inverse[half], v[1] * inverse[half]), __NV_SATFINITE, __NV_E4M3);
      const int to_row = half * 8 + lane / 4;
      const int chunk = c / 2 ^ (to_row & 7);
      const std::uint32_t to = store + to_row * 128 + chunk * 16 + c % 2 * 8 + lane % 4 * 2;
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(pair) : "memory");
    }
  }
  __syncwarp();
  CopyOut(args, store, row, end, column, 1);
  __syncwarp();
}

// A warpgroup's work: 64 rows of every tile of this block.
template <DataType kWeights, FfnProduct kProduct>
__device__ void MultiplyTiles(const FfnProductArgs& args, const Ring& ring) {
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int warp = static_cast<int>(threadIdx.x) / 32 - 4;  // of the 8 that multiply
  const int lane = static_cast<int>(threadIdx.x) % 32;
  TileWalk walk = WalkTiles(args, static_cast<int>(ClusterRank()));
  RingPosition at;
  FfnTile tile;
  while (walk.Next(&tile)) {
    const int row = tile.row + warp * 16;  // of the warp
    if (tile.row + group * kHopperRowBox >= tile.end) {
      for (int k = 0; k < args.k; k += kElements<kWeights>, at.Advance()) {
        WaitBarrier(ring.full(at.stage), at.parity);
        Release(ring, at.stage);
      }
      continue;
    }
    float d[kAccumulators];
    if constexpr (kWeights == DataType::kBf16) {
      AccumulateBf16(ring, group, args.k, &at, d);
    } else {
      AccumulateFp8(ring, group, ScaleReader<kProduct>(args, tile, row + lane / 4), &at, d);
    }
    const int column = kProduct == FfnProduct::kGateUp ? tile.column / 2 : tile.column;
    if constexpr (kWeights == DataType::kFp8E4m3 && kProduct == FfnProduct::kGateUp) {
      StoreQuantizedTile(d, args, ring.store(warp), row, tile.end, column);
    } else {
      StoreTile<kProduct>(d, args, ring.store(warp), row, tile.end, column);
    }
  }
}

template <DataType kWeights, FfnProduct kProduct>
__global__ void __cluster_dims__(kClusterBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    HopperFfnKernel(const __grid_constant__ FfnProductArgs args,
                    const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap w) {
  extern __shared__ __align__(1024) std::byte shared[];
  const Ring ring{SharedAddress(shared)};
  if (threadIdx.x == 0) {
    PrefetchTensorMap(&a);
    PrefetchTensorMap(&w);
    for (int stage = 0; stage < kStages; ++stage) {
      InitBarrier(ring.full(stage), 1);
      InitBarrier(ring.empty(stage), kClusterBlocks * kMathWarps);
    }
    FenceBarrierInit();
  }
  ClusterSync();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyRegisters>();
    if (threadIdx.x == 0) CopyTiles<kWeights>(args, &a, &w, ring);
    __syncwarp();
  } else {
    TakeRegisters<kMathRegisters>();
    MultiplyTiles<kWeights, kProduct>(args, ring);
  }
  ClusterSync();  // The peer still arrives at this block's barriers, and copies into its stages.
}

template <DataType kWeights, FfnProduct kProduct>
absl::StatusOr<int> Prepare() {
  constexpr int kBytes = kSharedBytes;
  const auto kernel = HopperFfnKernel<kWeights, kProduct>;
  EPS_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = kClusterBlocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  int clusters = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters < 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("expert ffn: a cluster of ", kClusterBlocks, " blocks with ", kBytes,
                     " bytes of shared memory each exceeds this device; use the portable kernel"));
  }
  return clusters * kClusterBlocks;
}

template <DataType kWeights>
absl::Status Launch(bool down, const FfnProductArgs& args, const CUtensorMap& a,
                    const CUtensorMap& w, int num_blocks, cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes;
  if (down) {
    HopperFfnKernel<kWeights, FfnProduct::kDown>
        <<<num_blocks, kThreads, kBytes, stream>>>(args, a, w);
  } else {
    HopperFfnKernel<kWeights, FfnProduct::kGateUp>
        <<<num_blocks, kThreads, kBytes, stream>>>(args, a, w);
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<int> PrepareHopperFfn(DataType weights) {
  if (weights == DataType::kBf16) {
    EPS_RETURN_IF_ERROR((Prepare<DataType::kBf16, FfnProduct::kDown>().status()));
    return Prepare<DataType::kBf16, FfnProduct::kGateUp>();
  }
  EPS_RETURN_IF_ERROR((Prepare<DataType::kFp8E4m3, FfnProduct::kDown>().status()));
  return Prepare<DataType::kFp8E4m3, FfnProduct::kGateUp>();
}

absl::Status LaunchHopperFfn(DataType weights, bool down, const FfnProductArgs& args,
                             const CUtensorMap& a, const CUtensorMap& w, int num_blocks,
                             cudaStream_t stream) {
  return weights == DataType::kBf16
             ? Launch<DataType::kBf16>(down, args, a, w, num_blocks, stream)
             : Launch<DataType::kFp8E4m3>(down, args, a, w, num_blocks, stream);
}

}  // namespace epserve::runtime
