// In what order a launch's teams take the rows to work on. Multiprocessors do not reach the link
// alike: with equal shares, on four H200s, the first blocks of a combine had pushed theirs after
// 215 us and the last ones after 506. So each team draws its next row when it is ready for one.
// What is made of a row does not depend on who makes it.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_TURNS_CUH_
#define EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_TURNS_CUH_

#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

// A team's turns: indices from 0 on, each team's growing, each index some team's. Where nothing is
// drawn, every `stride`-th from `first` on. Called by a whole warp.
class RowTurns {
 public:
  __device__ RowTurns(const RowTickets& tickets, int first, int stride)
      : word_(tickets.word), stride_(stride), ahead_(first) {
    if (word_ == nullptr || threadIdx.x % 32 != 0) return;
    // Whichever team comes first takes the count from an earlier launch's to this one's start.
    atomicMax(word_, tickets.launch << kIndexBits);
    Draw();
  }

  // The next index; the one after is on its way from then on.
  __device__ int Next() {
    const int index = __shfl_sync(0xffffffffu, ahead_, 0);
    if (word_ == nullptr) {
      ahead_ = index + stride_;
    } else if (threadIdx.x % 32 == 0) {
      Draw();
    }
    return index;
  }

  // How many turns are between an index of this team and its next; 0: it cannot be said.
  __device__ int stride() const { return word_ == nullptr ? stride_ : 0; }

 private:
  // 2^38 launches, and 2^26 rows and draws beyond the last row of one.
  static constexpr int kIndexBits = 26;

  __device__ void Draw() {
    ahead_ = static_cast<int>(atomicAdd(word_, 1ull) & ((1ull << kIndexBits) - 1));
  }

  unsigned long long* word_;
  int stride_;
  int ahead_;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_CUDA_ROW_TURNS_CUH_
