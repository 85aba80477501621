// What the feed-forward's kernels share: the walk over a grouped product's tiles, and SwiGLU.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_DEVICE_CUH_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_DEVICE_CUH_

#include <cuda_bf16.h>

#include <cstdint>

namespace epserve::runtime {

// The two products of the feed-forward.
enum class FfnProduct { kGateUp, kDown };

struct FfnTile {
  int expert;
  int row;           // first of the tile
  int end;           // one past the expert's last row
  int column;        // first of the tile, in the expert's weight rows
  bool same_weight;  // the cluster's blocks: the same columns of different rows, else the reverse
};

// Deals the tiles of a grouped product to clusters of kBlocks blocks, round robin. The order keeps
// what runs at one time within few rows and few columns, for the L2 cache: experts in turn, in each
// groups of kGroup row tiles, in those columns in turn. A cluster takes kBlocks row tiles of one
// column; what is left of an expert's row tiles is one whose columns are dealt kBlocks at a time,
// so that no block of a cluster idles for an uneven number of rows.
template <int kTileRows, int kTileColumns, int kBlocks>
class FfnTileWalk {
 public:
  __device__ FfnTileWalk(const std::int32_t* offsets, int num_experts, int max_rows, int columns,
                         int cluster, int num_clusters, int block)
      : offsets_(offsets),
        num_experts_(num_experts),
        max_rows_(max_rows),
        column_tiles_((columns + kTileColumns - 1) / kTileColumns),
        num_clusters_(num_clusters),
        block_(block),
        next_(cluster) {
    Open(0);
  }

  // False when there are no more.
  __device__ bool Next(FfnTile* tile) {
    while (next_ >= count_) {
      if (expert_ + 1 >= num_experts_) return false;
      next_ -= count_;
      Open(expert_ + 1);
    }
    int i = next_;
    next_ += num_clusters_;
    tile->expert = expert_;
    tile->end = end_;
    const int whole = row_tiles_ / kBlocks;  // clusters' worth of row tiles
    if (i < whole * column_tiles_) {
      const int group = i / (kGroup * column_tiles_);
      i -= group * kGroup * column_tiles_;
      const int in_group = min(kGroup, whole - group * kGroup);
      const int row_tile = (group * kGroup + i % in_group) * kBlocks + block_;
      tile->row = begin_ + row_tile * kTileRows;
      tile->column = i / in_group * kTileColumns;
      tile->same_weight = true;
    } else {
      i -= whole * column_tiles_;
      tile->row = begin_ + whole * kBlocks * kTileRows;
      tile->column = (i * kBlocks + block_) * kTileColumns;
      tile->same_weight = false;
    }
    return true;
  }

 private:
  static constexpr int kGroup = 8;
  static_assert(kBlocks == 1 || kBlocks == 2, "of 3 and more, several row tiles would be left");

  __device__ void Open(int expert) {
    expert_ = expert;
    // Offsets past the buffers would be the caller's bug; they must not become writes there.
    begin_ = min(__ldg(offsets_ + expert), max_rows_);
    end_ = min(__ldg(offsets_ + expert + 1), max_rows_);
    row_tiles_ = (max(end_ - begin_, 0) + kTileRows - 1) / kTileRows;
    count_ = row_tiles_ / kBlocks * column_tiles_;
    if (row_tiles_ % kBlocks != 0) count_ += (column_tiles_ + kBlocks - 1) / kBlocks;
  }

  const std::int32_t* const offsets_;
  const int num_experts_;
  const int max_rows_;
  const int column_tiles_;
  const int num_clusters_;
  const int block_;
  // This cluster's next tile, counted from the open expert's first. 32 bits do: the result of 2^31
  // tiles would fill terabytes.
  int next_;
  int expert_ = 0;
  int begin_ = 0;
  int end_ = 0;
  int row_tiles_ = 0;
  int count_ = 0;
};

__device__ inline float SwiGlu(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

__device__ inline std::uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_DEVICE_CUH_
