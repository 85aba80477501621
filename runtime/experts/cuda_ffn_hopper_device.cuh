// The Hopper instructions of the feed-forward: mbarriers within a cluster, tensor copies, wgmma.
// sm_90a alone.
#ifndef EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_HOPPER_DEVICE_CUH_
#define EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_HOPPER_DEVICE_CUH_

#include <cuda.h>

#include <cstdint>

namespace epserve::runtime {

__device__ inline std::uint32_t SharedAddress(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline std::uint32_t ClusterRank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of both blocks; orders what came before it in one for what comes after in the other.
__device__ inline void ClusterSync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

__device__ inline void InitBarrier(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised barriers known to the copy engine and to the peer block. Its pair is the
// ClusterSync after it.
__device__ inline void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void ArriveExpectBytes(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at the barrier of the same offset in block `rank` of the cluster: this warp's products
// have read the stage, so either block's copies may overwrite it. What it orders are finished reads
// of shared memory by the Tensor cores; a release of cluster scope would wait for all of the
// thread's traffic with global memory as well, a thousand cycles every stage.
__device__ inline void ArriveInCluster(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Bounded by this kernel's own progress: nothing outside the cluster is waited for.
__device__ inline void WaitBarrier(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One box of a tensor, from element `column` of row `row`, into this block.
__device__ inline void CopyBox(std::uint32_t to, const CUtensorMap* map, int column, int row,
                               std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same into both blocks of the cluster, at the same offsets, each block's barrier told.
__device__ inline void CopyBoxToBoth(std::uint32_t to, const CUtensorMap* map, int column, int row,
                                     std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<std::uint16_t>(3))
      : "memory");
}

template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Describes an operand whose rows are 128 bytes of K, swizzled by the tensor copy's 128-byte
// pattern: 8 rows make 1024 bytes. Adding 2 moves 32 bytes along K.
__device__ inline std::uint64_t OperandDescriptor(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle128 = 1ull << 62;
  constexpr std::uint64_t kEightRows = (1024ull >> 4) << 32;
  constexpr std::uint64_t kUnusedLeading = 1ull << 16;
  return kSwizzle128 | kEightRows | kUnusedLeading | ((address & 0x3ffffu) >> 4);
}

__device__ inline void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// At most kPending groups of this warpgroup are still running after it.
template <int kPending>
__device__ inline void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving the accumulators' uses across the asynchronous products.
template <int kCount>
__device__ inline void FenceAccumulators(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define EPS_ACC4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define EPS_ACC16(i) EPS_ACC4(i), EPS_ACC4((i) + 4), EPS_ACC4((i) + 8), EPS_ACC4((i) + 12)
#define EPS_ACC64(i) EPS_ACC16(i), EPS_ACC16((i) + 16), EPS_ACC16((i) + 32), EPS_ACC16((i) + 48)

// d (+)= a [64, 16] * b [256, 16]^T, bf16; `accumulate` 0 overwrites.
__device__ inline void WgmmaBf16(float (&d)[128], std::uint64_t a, std::uint64_t b,
                                 int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
      "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p, 1, 1, 0, 0;\n"
      "}"
      : EPS_ACC64(0), EPS_ACC64(64)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (+)= a [64, 32] * b [128, 32]^T, e4m3; `accumulate` 0 overwrites.
__device__ inline void WgmmaFp8(float (&d)[64], std::uint64_t a, std::uint64_t b, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1;\n"
      "}"
      : EPS_ACC64(0)
      : "l"(a), "l"(b), "r"(accumulate));
}

#undef EPS_ACC64
#undef EPS_ACC16
#undef EPS_ACC4

// Four 8x8 matrices of b16, one row's address a lane.
__device__ inline void StoreMatrices(std::uint32_t address, const std::uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_CUDA_FFN_HOPPER_DEVICE_CUH_
