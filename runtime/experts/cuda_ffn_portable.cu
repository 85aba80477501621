// The grouped product on any chip with bf16 Tensor cores: mma.sync, tiles of 64 x 64, four warps.
// fp8 weights are widened to bf16 on their way into shared memory.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "runtime/base/cuda_status.h"
#include "runtime/experts/cuda_ffn_device.cuh"
#include "runtime/experts/cuda_ffn_kernels.h"
#include "runtime/experts/cuda_ffn_weights.h"

namespace epserve::runtime {
namespace {

constexpr int kThreads = 128;
constexpr int kTileRows = 64;
constexpr int kTileColumns = 64;
constexpr int kTileK = 32;
// Elements from row to row in shared memory: 20 words, so that the 8 rows of a fragment start in
// different banks.
constexpr int kPitch = kTileK + 8;
constexpr int kColumns8 = kTileColumns / 8;
constexpr int kVector = 8;  // elements of a 16-byte vector
constexpr int kVectorsOfRow = kTileK / kVector;
constexpr int kVectorsOfThread = kTileRows * kVectorsOfRow / kThreads;

using TileWalk = FfnTileWalk<kTileRows, kTileColumns, /*kBlocks=*/1>;

struct Tiles {
  __nv_bfloat16 rows[kTileRows][kPitch];
  __nv_bfloat16 weights[kTileColumns][kPitch];
};

// A thread's part of the next step of K, on its way to shared memory.
struct Staged {
  uint4 rows[kVectorsOfThread];
  uint4 weights[kVectorsOfThread];
};

// The scale of a weight row's 128 columns from k.
template <FfnProduct kProduct>
__device__ float WeightScale(const FfnProductArgs& args, int expert, int row, int k) {
  constexpr int kParts = kProduct == FfnProduct::kGateUp ? 2 : 1;
  constexpr int kBlock = static_cast<int>(kFfnFp8Block);
  const int blocks = (args.weight_rows / kParts + kBlock - 1) / kBlock;
  const int k_blocks = (args.k + kBlock - 1) / kBlock;
  const int part = kParts == 2 ? row / static_cast<int>(kFfnInterleave) % 2 : 0;
  const std::int64_t index =
      static_cast<std::int64_t>(expert * blocks + row / kParts / kBlock) * kParts + part;
  return args.weight_scales[index * k_blocks + k / kBlock];
}

__device__ uint4 WidenFp8(uint2 packed, float scale) {
  const auto* in = reinterpret_cast<const __nv_fp8x2_storage_t*>(&packed);
  uint4 result;
  auto* out = reinterpret_cast<std::uint32_t*>(&result);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 h(__nv_cvt_fp8x2_to_halfraw2(in[i], __NV_E4M3));
    const float2 f = __half22float2(h);
    out[i] = PackBf16(f.x * scale, f.y * scale);
  }
  return result;
}

template <DataType kWeights, FfnProduct kProduct>
__device__ void LoadStep(const FfnProductArgs& args, const FfnTile& tile, int k, Staged* staged) {
#pragma unroll
  for (int i = 0; i < kVectorsOfThread; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    const int r = vector / kVectorsOfRow;
    const int column = k + vector % kVectorsOfRow * kVector;
    staged->rows[i] = make_uint4(0, 0, 0, 0);
    staged->weights[i] = make_uint4(0, 0, 0, 0);
    if (column >= args.k) continue;  // K is a multiple of 16: a vector is in it or not.
    if (tile.row + r < tile.end) {
      const std::int64_t at = static_cast<std::int64_t>(tile.row + r) * args.k + column;
      staged->rows[i] = static_cast<const uint4*>(args.a)[at / kVector];
    }
    const int weight_row = tile.column + r;
    if (weight_row >= args.weight_rows) continue;
    const std::int64_t at =
        (static_cast<std::int64_t>(tile.expert) * args.weight_rows + weight_row) * args.k + column;
    if constexpr (kWeights == DataType::kBf16) {
      staged->weights[i] = static_cast<const uint4*>(args.weights)[at / kVector];
    } else {
      const uint2 packed = static_cast<const uint2*>(args.weights)[at / kVector];
      const float scale = WeightScale<kProduct>(args, tile.expert, weight_row, column);
      staged->weights[i] = WidenFp8(packed, scale);
    }
  }
}

__device__ void PutStep(const Staged& staged, Tiles* tiles) {
#pragma unroll
  for (int i = 0; i < kVectorsOfThread; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x);
    const int r = vector / kVectorsOfRow;
    const int column = vector % kVectorsOfRow * kVector;
    *reinterpret_cast<uint4*>(&tiles->rows[r][column]) = staged.rows[i];
    *reinterpret_cast<uint4*>(&tiles->weights[r][column]) = staged.weights[i];
  }
}

__device__ std::uint32_t Pair(const __nv_bfloat16* from) {
  return *reinterpret_cast<const std::uint32_t*>(from);
}

// d += a [16, 16] * b [8, 16]^T, bf16.
__device__ void Mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ void MultiplyStep(const Tiles& tiles, int warp, int lane, float (&d)[kColumns8][4]) {
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    const int r = warp * 16 + lane / 4;
    const int c = k + lane % 4 * 2;
    const std::uint32_t a[4] = {Pair(&tiles.rows[r][c]), Pair(&tiles.rows[r + 8][c]),
                                Pair(&tiles.rows[r][c + 8]), Pair(&tiles.rows[r + 8][c + 8])};
#pragma unroll
    for (int j = 0; j < kColumns8; ++j) {
      const std::uint32_t b[2] = {Pair(&tiles.weights[j * 8 + lane / 4][c]),
                                  Pair(&tiles.weights[j * 8 + lane / 4][c + 8])};
      Mma(d[j], a, b);
    }
  }
}

template <FfnProduct kProduct>
__device__ void StoreTile(const FfnProductArgs& args, const FfnTile& tile, int warp, int lane,
                          const float (&d)[kColumns8][4]) {
  constexpr int kParts = kProduct == FfnProduct::kGateUp ? 2 : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.row + warp * 16 + half * 8 + lane / 4;
    if (row >= tile.end) continue;
#pragma unroll
    for (int j = 0; j < kColumns8; j += kParts) {
      const int column = (tile.column + j * 8) / kParts + lane % 4 * 2;
      if (column >= args.out_columns) continue;
      const float* v = &d[j][half * 2];
      std::uint32_t pair = PackBf16(v[0], v[1]);
      if constexpr (kParts == 2) {
        const float* up = &d[j + 1][half * 2];
        pair = PackBf16(SwiGlu(v[0], up[0]), SwiGlu(v[1], up[1]));
      }
      const std::int64_t at = static_cast<std::int64_t>(row) * args.out_columns + column;
      static_cast<std::uint32_t*>(args.out)[at / 2] = pair;
    }
  }
}

template <DataType kWeights, FfnProduct kProduct>
__global__ void __launch_bounds__(kThreads)
    PortableFfnKernel(const __grid_constant__ FfnProductArgs args) {
  __shared__ Tiles tiles;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  TileWalk walk(args.expert_offset, args.num_experts, args.max_rows, args.weight_rows,
                static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), 0);
  FfnTile tile;
  while (walk.Next(&tile)) {
    float d[kColumns8][4] = {};
    Staged staged;
    LoadStep<kWeights, kProduct>(args, tile, 0, &staged);
    for (int k = 0; k < args.k; k += kTileK) {
      PutStep(staged, &tiles);
      __syncthreads();
      if (k + kTileK < args.k) LoadStep<kWeights, kProduct>(args, tile, k + kTileK, &staged);
      MultiplyStep(tiles, warp, lane, d);
      __syncthreads();
    }
    StoreTile<kProduct>(args, tile, warp, lane, d);
  }
}

template <DataType kWeights>
absl::StatusOr<int> Prepare() {
  EPS_RETURN_IF_ERROR(LoadKernel(PortableFfnKernel<kWeights, FfnProduct::kDown>));
  int device = 0, processors = 0, blocks = 0;
  EPS_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  EPS_CUDA_RETURN_IF_ERROR(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  EPS_CUDA_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, PortableFfnKernel<kWeights, FfnProduct::kGateUp>, kThreads, 0));
  return processors * blocks;
}

template <DataType kWeights>
void Launch(bool down, const FfnProductArgs& args, int num_blocks, cudaStream_t stream) {
  if (down) {
    PortableFfnKernel<kWeights, FfnProduct::kDown><<<num_blocks, kThreads, 0, stream>>>(args);
  } else {
    PortableFfnKernel<kWeights, FfnProduct::kGateUp><<<num_blocks, kThreads, 0, stream>>>(args);
  }
}

}  // namespace

absl::StatusOr<int> PreparePortableFfn(DataType weights) {
  return weights == DataType::kBf16 ? Prepare<DataType::kBf16>() : Prepare<DataType::kFp8E4m3>();
}

absl::Status LaunchPortableFfn(DataType weights, bool down, const FfnProductArgs& args,
                               int num_blocks, cudaStream_t stream) {
  if (weights == DataType::kBf16) {
    Launch<DataType::kBf16>(down, args, num_blocks, stream);
  } else {
    Launch<DataType::kFp8E4m3>(down, args, num_blocks, stream);
  }
  EPS_CUDA_RETURN_IF_ERROR(cudaGetLastError());
  return absl::OkStatus();
}

}  // namespace epserve::runtime
