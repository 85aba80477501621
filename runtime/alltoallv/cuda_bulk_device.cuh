// Bulk asynchronous copies from global to shared memory, and the barriers in shared memory that
// they complete on (sm_90). Copies are of 16-byte multiples, between 16-byte aligned addresses.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_BULK_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_BULK_DEVICE_CUH_

#include <cstdint>

namespace epserve::runtime {

// A barrier of the block's shared memory, whose phases complete one after another.
class BulkBarrier {
 public:
  // Called by one thread; FenceInit() and a __syncthreads() come before anyone's use.
  __device__ void Init(unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(Address()), "r"(arrivals)
                 : "memory");
  }
  // The copy engine, which completes on the barriers, sees them initialised.
  static __device__ void FenceInit() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // release, block: what this thread did to shared memory comes before what Wait() lets go on.
  __device__ void Arrive(unsigned arrivals = 1) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(Address()),
                 "r"(arrivals)
                 : "memory");
  }

  // Arrives once, and has the phase wait for `bytes` of a copy.
  __device__ void ArriveExpecting(unsigned bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(Address()),
        "r"(bytes)
        : "memory");
  }

  // Whether the phase of this parity has completed. acquire, block: pairs with Arrive().
  __device__ bool Test(unsigned parity) {
    unsigned done = 0;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(Address()), "r"(parity)
        : "memory");
    return done != 0;
  }

  // Waits until it has. For what this block alone brings about, so that no deadline is needed.
  __device__ void Wait(unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(Address()),
        "r"(parity)
        : "memory");
  }

  // Called by one thread: the copy's bytes count towards the phase that ArriveExpecting() began.
  __device__ void CopyIn(void* shared, const void* global, unsigned bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(Address())
        : "memory");
  }

 private:
  __device__ unsigned Address() const {
    return static_cast<unsigned>(__cvta_generic_to_shared(&word_));
  }

  std::uint64_t word_;
};

// What came before of ordinary reads and writes of the block's shared memory, this thread's or
// acquired by it, comes before the copy engine's later writes to it.
__device__ inline void FenceSharedForBulk() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has acquired as ordinary global memory is there for the copy engine's later
// reads.
__device__ inline void FenceGlobalForBulk() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_BULK_DEVICE_CUH_
