// Rows as packets: each 8 bytes of a row travel with the number of the use that they belong to, so
// that the receiver sees of every one by itself whether it has come. A row so sent takes one way
// over the link, where rows with flags behind them take the row's way, its acknowledgement's, which
// the release of the flag waits for, and the flag's. It is twice as long: for few rows.
//
// A receiver finds packets of its own use or of an earlier one, never of a later: between two uses
// of an area there is one of the other, whose dispatch a rank ends only when all ranks have begun
// it, and so have ended the combine before.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_PACKET_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_PACKET_DEVICE_CUH_

#include "runtime/alltoallv/cuda_device.cuh"
#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

// relaxed: the packet says all there is to know. system: the reader is another GPU. The memory
// model has 16 bytes of type b128 be one access; CUDA 13.0's cuda::atomic_ref does not assemble for
// them.
__device__ inline void StorePacket(Packet* to, std::uint64_t data, std::uint64_t use) {
  asm volatile(
      "{\n"
      ".reg .b128 packet;\n"
      "mov.b128 packet, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], packet;\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "l"(data), "l"(use)
      : "memory");
}

// Pairs with StorePacket().
__device__ inline Packet LoadPacket(const Packet* from) {
  Packet packet;
  asm volatile(
      "{\n"
      ".reg .b128 packet;\n"
      "ld.relaxed.sys.global.b128 packet, [%2];\n"
      "mov.b128 {%0, %1}, packet;\n"
      "}"
      : "=l"(packet.data), "=l"(packet.use)
      : "l"(__cvta_generic_to_global(from))
      : "memory");
  return packet;
}

// 16 bytes of a row as two packets.
struct PacketPair {
  Packet low;
  Packet high;

  __device__ bool IsOf(std::uint64_t use) const { return low.use == use && high.use == use; }
  __device__ uint4 Vector() const {
    return make_uint4(static_cast<unsigned>(low.data), static_cast<unsigned>(low.data >> 32),
                      static_cast<unsigned>(high.data), static_cast<unsigned>(high.data >> 32));
  }
};

__device__ inline void StoreVector(Packet* to, const uint4& v, std::uint64_t use) {
  StorePacket(to, v.x | std::uint64_t{v.y} << 32, use);
  StorePacket(to + 1, v.z | std::uint64_t{v.w} << 32, use);
}

__device__ inline PacketPair LoadPair(const Packet* from) {
  return {LoadPacket(from), LoadPacket(from + 1)};
}

// What a source says to each rank at the begin of every dispatch of an area that has packets.
struct PacketHead {
  std::uint32_t rows;        // that come as packets
  std::uint32_t as_packets;  // 0: they come as rows, and the arrivals count

  __device__ std::uint64_t Word() const { return rows | std::uint64_t{as_packets} << 32; }
  static __device__ PacketHead Of(std::uint64_t word) {
    return {static_cast<std::uint32_t>(word), static_cast<std::uint32_t>(word >> 32)};
  }
};

// Never more than there are places for, whatever the source says.
__device__ inline int RowsOf(const PacketHead& head, const AreaLayout& layout) {
  return static_cast<int>(min(static_cast<std::int64_t>(head.rows), layout.packet_capacity));
}

// `area`: of the rank that receives.
__device__ inline Packet* HeadOf(std::byte* area, const AreaLayout& layout, int source) {
  return reinterpret_cast<Packet*>(area + layout.packet_heads + source * kFlagStrideBytes);
}

__device__ inline Packet* PacketRow(std::byte* area, const AreaLayout& layout, int source,
                                    std::int64_t row) {
  return reinterpret_cast<Packet*>(area + layout.packet_rows +
                                   (source * layout.packet_capacity + row) *
                                       layout.packet_row_bytes);
}

// `from`: the rank that has taken the sum; `area`: of the one whose token it is.
__device__ inline Packet* PacketPartial(std::byte* area, const AreaLayout& layout, int from,
                                        std::int64_t row) {
  return reinterpret_cast<Packet*>(area + layout.packet_partials +
                                   (from * layout.packet_capacity + row) *
                                       layout.packet_partial_bytes);
}

// Warps of a grid, numbered so that consecutive ones are on different multiprocessors: pieces of
// one row are stored by many at a time.
__device__ inline int GridWarp(int num_blocks) {
  return static_cast<int>(threadIdx.x / 32) * num_blocks + static_cast<int>(blockIdx.x);
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_PACKET_DEVICE_CUH_
