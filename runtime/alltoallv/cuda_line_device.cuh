// Rows as lines of 128 bytes, 120 of the row and 8 of the number of the use that they belong to
// (see line_format.h), so that the receiver sees of every line by itself whether it has come. A row
// so sent takes one way over the link, where rows with flags behind them take the row's way, its
// acknowledgement's, which the release of the flag waits for, and the flag's. It is 7 % longer.
//
// What this relies on is not of the memory model, which knows no access of 128 bytes: that eight
// neighbouring lanes of a warp, which store 16 bytes each to one aligned line in one instruction,
// have it written as a whole, and that a load of theirs sees it so. It holds in a GPU's own memory
// and over NVLink from Volta on, where NCCL's LL128 protocol relies on the same (its tuning.cc:
// "Enable LL128 by default only on Volta/Ampere/Hopper/Blackwell+NVLink. Other cases are not tested
// and may cause silent data corruption"), and not over PCIe: see runtime/symmetric/nvlink.h.
//
// A receiver finds lines of its own use or of an earlier one, never of a later: between two uses of
// an area there is one of the other, whose dispatch a rank ends only when all ranks have begun it,
// and so have ended the combine before.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_LINE_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_LINE_DEVICE_CUH_

#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"
#include "runtime/alltoallv/line_format.h"

namespace epserve::runtime {

inline constexpr int kLinesAtOnce = kWarpSize / kLineLanes;  // a warp's in one instruction

// A lane's 16 bytes of a line; a tail's are 8 and the number.
using LaneData = Numbered;

__device__ inline LaneData LaneDataOf(const uint4& v) {
  return {v.x | std::uint64_t{v.y} << 32, v.z | std::uint64_t{v.w} << 32};
}

__device__ inline uint4 VectorOf(const LaneData& data) {
  return make_uint4(static_cast<unsigned>(data.data), static_cast<unsigned>(data.data >> 32),
                    static_cast<unsigned>(data.use), static_cast<unsigned>(data.use >> 32));
}

// relaxed: the line says all there is to know. system: the reader is another GPU. The memory model
// has 16 bytes of type b128 be one access; CUDA 13.0's cuda::atomic_ref does not assemble for them.
__device__ inline void StoreLane(std::byte* to, const LaneData& data) {
  asm volatile(
      "{\n"
      ".reg .b128 lane;\n"
      "mov.b128 lane, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], lane;\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "l"(data.data), "l"(data.use)
      : "memory");
}

// Pairs with StoreLane().
__device__ inline LaneData LoadLane(const std::byte* from) {
  LaneData data;
  asm volatile(
      "{\n"
      ".reg .b128 lane;\n"
      "ld.relaxed.sys.global.b128 lane, [%2];\n"
      "mov.b128 {%0, %1}, lane;\n"
      "}"
      : "=l"(data.data), "=l"(data.use)
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  return data;
}

__device__ inline int LaneOfWarp() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int LaneOfLine() { return static_cast<int>(threadIdx.x) % kLineLanes; }
__device__ inline bool IsTail() { return LaneOfLine() == kTailLane; }

// Which of the warp's lines of one instruction is this lane's.
__device__ inline int LineOfWarp() { return LaneOfWarp() / kLineLanes; }

// Stores the warp's lines; `stores`: the same for the lanes of a line. `line`: this lane's.
__device__ inline void StoreLine(bool stores, std::byte* line, const LaneData& data) {
  __syncwarp();  // One instruction for all lanes of a line.
  if (stores) StoreLane(line + LaneOfLine() * sizeof(LaneData), data);
}

// Looks for the warp's lines. True in the lanes of those that are `wanted`, the same for the lanes
// of a line, and have come; their part is then in `data`. Several looks: LoadLine of all, then
// HasCome of all.
__device__ inline void LoadLine(bool wanted, const std::byte* line, LaneData* data) {
  __syncwarp();  // As in StoreLine.
  if (wanted) *data = LoadLane(line + LaneOfLine() * sizeof(LaneData));
}
__device__ inline bool HasCome(bool wanted, const LaneData& data, std::uint64_t use) {
  const unsigned come = __ballot_sync(0xffffffffu, wanted && IsTail() && data.use == use);
  return ((come >> (LaneOfWarp() | kTailLane)) & 1u) != 0;
}

// What a tail carries of a vector.
__device__ inline uint4 HalfOf(const uint4& v, int half) {
  return half == 0 ? v : make_uint4(v.z, v.w, 0, 0);
}

// What a source says to each rank at the begin of every dispatch of an area that has lines.
struct LineHead {
  std::uint32_t rows;      // that come as lines
  std::uint32_t as_lines;  // 0: they come as rows, and the arrivals count

  __device__ std::uint64_t Word() const { return rows | std::uint64_t{as_lines} << 32; }
  static __device__ LineHead Of(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word), static_cast<std::uint32_t>(word >> 32)};
  }
};

// Never more than there are places for, whatever the source says.
__device__ inline int RowsOf(const LineHead& head, const AreaLayout& layout) {
  return static_cast<int>(min(static_cast<std::int64_t>(head.rows), layout.line_capacity));
}

// `area`: of the rank that receives.
__device__ inline std::byte* HeadOf(std::byte* area, const AreaLayout& layout, int source) {
  return area + layout.line_heads + source * kFlagStrideBytes;
}

__device__ inline std::byte* LineRow(std::byte* area, const AreaLayout& layout, int source,
                                     std::int64_t row) {
  return area + layout.line_rows + (source * layout.line_capacity + row) * layout.line_row_bytes;
}

// `from`: the rank that has taken the sum; `area`: of the one whose token it is.
__device__ inline std::byte* LinePartial(std::byte* area, const AreaLayout& layout, int from,
                                         std::int64_t row) {
  return area + layout.line_partials +
         (from * layout.line_capacity + row) * layout.line_partial_bytes;
}

// Warps of `num_blocks` blocks, numbered from block `first_block` on so that consecutive ones are
// on different multiprocessors: pieces of one row are stored by many at a time.
__device__ inline int GridWarp(int num_blocks, int first_block = 0) {
  return static_cast<int>(threadIdx.x / kWarpSize) * num_blocks +
         static_cast<int>(blockIdx.x) - first_block;
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_LINE_DEVICE_CUH_
