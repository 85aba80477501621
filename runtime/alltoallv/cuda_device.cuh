// Device code that dispatch, combine and barrier share: flags, bounded waits, teams, vectors.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_DEVICE_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/atomic>
#include <type_traits>

#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

inline constexpr int kWarpSize = 32;

__device__ inline std::uint64_t GlobalTimerNs() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ inline std::uint64_t* FlagOf(std::byte* flags, int index) {
  return reinterpret_cast<std::uint64_t*>(flags +
                                          static_cast<std::int64_t>(index) * kFlagStrideBytes);
}

// What a source says it has sent here; never more than it has places for, whatever it says. `area`:
// this rank's, whose rows have places by source.
__device__ inline int CountedRows(const std::byte* area, const AreaView& view, int source) {
  // From L2: written by a peer.
  const int rows =
      __ldcg(reinterpret_cast<const std::int32_t*>(area + view.layout.counts) + source);
  return min(max(rows, 0), static_cast<int>(view.layout.row_capacity / view.num_ranks));
}

// The row's notes in an area (see AreaLayout): [K] experts, and [K] weights.
template <typename Byte>  // const or not
__device__ inline auto* ExpertNotes(Byte* area, const AreaLayout& layout, std::int64_t row) {
  using Id = std::conditional_t<std::is_const_v<Byte>, const std::int32_t, std::int32_t>;
  return reinterpret_cast<Id*>(area + layout.notes + row * layout.note_bytes);
}
template <typename Byte>
__device__ inline auto* WeightNotes(Byte* area, const AreaLayout& layout, std::int64_t row,
                                    int topk) {
  using Weight = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  return reinterpret_cast<Weight*>(ExpertNotes(area, layout, row) + topk);
}

// [H / 128] scales of a row.
template <typename Byte>
__device__ inline auto* RowScales(Byte* area, const AreaLayout& layout, std::int64_t row) {
  using Scale = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  return reinterpret_cast<Scale*>(area + layout.scales + row * layout.scale_bytes);
}

inline constexpr unsigned kEagerPolls = 32;  // about 20 us
inline constexpr unsigned kPauseNs = 200;

// True once a wait of this rank has given up. Nothing that the kernels behind it would read can be
// trusted then, and nothing they make may reach a peer: they return at once, and raise no flag.
__device__ inline bool GaveUp(const WaitControl& control) {
  return *const_cast<const volatile std::uint32_t*>(control.report_claim) != 0;
}

// Whether a wait that began at `start` is to end without what it waits for; then that, or another
// wait of this rank, is in the report, which the host turns into a Status.
__device__ inline bool GivesUp(std::uint64_t start, int peer, WaitStage stage,
                               const WaitControl& control) {
  if (GaveUp(control)) return true;
  const std::uint64_t waited = GlobalTimerNs() - start;
  const bool aborted = *const_cast<const volatile std::uint32_t*>(control.abort_word) != 0;
  if (!aborted && waited < static_cast<std::uint64_t>(control.timeout_ns)) return false;
  // The first to give up reports; the others' reports would name the same cause.
  if (atomicCAS(control.report_claim, 0u, 1u) == 0u) {
    control.report->peer = peer;
    control.report->waited_ns = waited;
    control.report->aborted = aborted ? 1u : 0u;
    // release: the fields first. system: the host reads them.
    cuda::atomic_ref<std::uint32_t, cuda::thread_scope_system>(control.report->stage)
        .store(static_cast<std::uint32_t>(stage), cuda::memory_order_release);
  }
  return true;
}

// Between two looks at what is waited for; true where it is time to ask GivesUp().
__device__ inline bool PauseBetweenPolls(unsigned spin) {
  // Thousands of waiting threads would crowd out the very stores they wait for: after the first
  // polls, which keep the short waits of the decode path short, they pause between looks.
  if (spin > kEagerPolls) __nanosleep(kPauseNs);
  // The abort word lies in host memory, a PCIe read away: look at it, and at the clock, rarely.
  return spin % 1024 == 0;
}

// Waits until *flag >= target. False where the wait gave up.
__device__ inline bool WaitAtLeast(std::uint64_t* flag, std::uint64_t target, int peer,
                                   WaitStage stage, const WaitControl& control) {
  // acquire: what the peer wrote before its release is visible after. system: the writer is another
  // GPU. Pairs with PublishToPeer and PublishRow.
  cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system> word(*flag);
  if (word.load(cuda::memory_order_acquire) >= target) return true;
  const std::uint64_t start = GlobalTimerNs();
  for (unsigned spin = 1;; ++spin) {
    if (word.load(cuda::memory_order_acquire) >= target) return true;
    if (PauseBetweenPolls(spin) && GivesUp(start, peer, stage, control)) return false;
  }
}

// A whole warp waits until `ready()`, which says the same to all lanes. False where it gave up; the
// peer that it then names is the one that the last `ready()` has left in `peer`.
template <typename Ready>
__device__ inline bool WarpWaitUntil(Ready ready, const int& peer, WaitStage stage,
                                     const WaitControl& control) {
  std::uint64_t start = 0;
#pragma unroll 1
  for (unsigned spin = 0;; ++spin) {
    // The one place that it is called from: it is long, and instructions that are not in the
    // multiprocessor's cache take longer to come than to be executed.
    if (ready()) return true;
    if (spin == 0) start = GlobalTimerNs();
    if (!PauseBetweenPolls(spin + 1)) continue;
    const bool ends = threadIdx.x % 32 == 0 && GivesUp(start, peer, stage, control);
    if (__any_sync(0xffffffffu, ends)) return false;
  }
}

// Called by one thread a peer, after a __syncthreads() that follows the block's last payload store.
__device__ inline void PublishToPeer(std::uint64_t* arrivals) {
  // release: the block's payload first (the barrier before made it this thread's past). system: the
  // reader is another GPU. Pairs with the acquire in WaitAtLeast.
  cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*arrivals).fetch_add(
      1, cuda::memory_order_release);
}

// Called by one thread of the team that wrote a row, after the team's sync().
__device__ inline void PublishRow(std::uint64_t* flag, std::uint64_t use) {
  // release, system: as in PublishToPeer, for one row.
  cuda::atomic_ref<std::uint64_t, cuda::thread_scope_system>(*flag).store(
      use, cuda::memory_order_release);
}

// Pairs of two-byte elements to and from fp32.
template <typename T>
struct PairOf;

template <>
struct PairOf<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ float2 ToFloats(Pair pair) { return __bfloat1622float2(pair); }
  static __device__ Pair FromFloats(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

template <>
struct PairOf<__half> {
  using Pair = __half2;
  static __device__ float2 ToFloats(Pair pair) { return __half22float2(pair); }
  static __device__ Pair FromFloats(float x, float y) { return __floats2half2_rn(x, y); }
};

// 16 bytes of elements to and from fp32.
template <typename T>
struct Vector16 {
  static constexpr int kElements = 8;
  using Pair = typename PairOf<T>::Pair;
  static __device__ void MultiplyAdd(const uint4& v, float w, float* acc) {
    const auto* pairs = reinterpret_cast<const Pair*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = PairOf<T>::ToFloats(pairs[i]);
      acc[2 * i] = fmaf(f.x, w, acc[2 * i]);
      acc[2 * i + 1] = fmaf(f.y, w, acc[2 * i + 1]);
    }
  }
  static __device__ uint4 Pack(const float* acc) {
    uint4 v;
    auto* pairs = reinterpret_cast<Pair*>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = PairOf<T>::FromFloats(acc[2 * i], acc[2 * i + 1]);
    return v;
  }
};

template <>
struct Vector16<float> {
  static constexpr int kElements = 4;
  static __device__ void MultiplyAdd(const uint4& v, float w, float* acc) {
    acc[0] = fmaf(__uint_as_float(v.x), w, acc[0]);
    acc[1] = fmaf(__uint_as_float(v.y), w, acc[1]);
    acc[2] = fmaf(__uint_as_float(v.z), w, acc[2]);
    acc[3] = fmaf(__uint_as_float(v.w), w, acc[3]);
  }
  static __device__ uint4 Pack(const float* acc) {
    return make_uint4(__float_as_uint(acc[0]), __float_as_uint(acc[1]), __float_as_uint(acc[2]),
                      __float_as_uint(acc[3]));
  }
};

// Which use of an area this launch is, and which area: from the host, or counted on the device.
struct AreaUse {
  std::uint64_t use;         // from 1
  std::int64_t byte_offset;  // of the area in every heap
};

// The use that the area is in. `counter` 0: dispatch, 1: combine.
__device__ inline AreaUse CurrentUse(const AreaView& area, int counter) {
  if (area.device_sequence == nullptr) return {area.use, area.area_offset};
  const std::uint64_t sequence = area.device_sequence[counter];
  return {sequence / 2 + 1,
          area.area_offset + static_cast<std::int64_t>(sequence % 2) * area.layout.bytes};
}

// Called once by every block of the launch that is the area's current use, with all of its threads
// and after all have called CurrentUse(): the last block to come advances the counter for the next
// launch, long before its work is done.
__device__ inline void AdvanceUse(const AreaView& area, int counter) {
  if (area.device_sequence == nullptr) return;
  __syncthreads();                      // All of the block's threads have read the counter.
  if (threadIdx.x == blockDim.x - 1) {  // Not of the first warp, which has other work.
    std::uint64_t* ticket = area.device_sequence + 2 + counter;
    // acq_rel, device: the last block's advance comes after every block's read of the counter.
    cuda::atomic_ref<std::uint64_t, cuda::thread_scope_device> tickets(*ticket);
    if (tickets.fetch_add(1, cuda::memory_order_acq_rel) == gridDim.x - 1) {
      *ticket = 0;
      area.device_sequence[counter] += 1;
    }
  }
}

__device__ inline AreaUse BeginUse(const AreaView& area, int counter) {
  const AreaUse use = CurrentUse(area, counter);
  AdvanceUse(area, counter);
  return use;
}

// Lets the next kernel of the stream start where it asks for that (see AwaitEarlierKernels): its
// launch then overlaps with this kernel's work.
__device__ inline void AllowNextKernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// In a kernel launched to start before the earlier ones end: waits until they have, and for what
// they wrote.
__device__ inline void AwaitEarlierKernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_DEVICE_CUH_
