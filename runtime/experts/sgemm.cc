#include "runtime/experts/sgemm.h"

#include <dnnl.h>
#include <omp.h>

#include <cstdlib>

#include "runtime/base/log.h"

namespace epserve::runtime {

void Sgemm(const SgemmArgs& args) {
  // oneDNN's threads are OpenMP's, and their number is the calling thread's own setting. Slots and
  // ranks run side by side already; more threads are ExpertFfn's to start.
  thread_local const bool one_thread = [] {
    omp_set_num_threads(1);
    return true;
  }();
  (void)one_thread;
  const dnnl_status_t status = dnnl_sgemm('N', 'T', args.m, args.n, args.k, 1.0f, args.x, args.ldx,
                                          args.w, args.k, 0.0f, args.y, args.ldy);
  if (status != dnnl_success) {
    // Only sizes that REQUIRES excludes, or memory for its packing running out, get here. There is
    // no result to go on with.
    LogError("sgemm_failed",
             {{"status", static_cast<int>(status)}, {"m", args.m}, {"n", args.n}, {"k", args.k}});
    std::abort();
  }
}

}  // namespace epserve::runtime
