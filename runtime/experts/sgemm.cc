#include "runtime/experts/sgemm.h"

#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "runtime/base/log.h"

namespace epserve::runtime {
namespace {

// Columns of y that one call makes. oneDNN packs as many rows of w first, so this bounds its
// scratch memory (1.2 MB at 256 rows and 512 columns, where 2048 columns take 2.4), and with few
// rows of x smaller packs stay in the cache.
std::int64_t BlockColumns(std::int64_t rows) {
  constexpr std::int64_t kFewRows = 32;
  return rows <= kFewRows ? 256 : 512;
}

}  // namespace

void Sgemm(const SgemmArgs& args) {
  // oneDNN's threads are OpenMP's, and their number is the calling thread's own setting. Slots and
  // ranks run side by side already; more threads are ExpertFfn's to start.
  thread_local const bool one_thread = [] {
    omp_set_num_threads(1);
    return true;
  }();
  (void)one_thread;
  const std::int64_t block = BlockColumns(args.m);
  dnnl_status_t status = dnnl_success;
  for (std::int64_t column = 0; column < args.n && status == dnnl_success; column += block) {
    status =
        dnnl_sgemm('N', 'T', args.m, std::min(block, args.n - column), args.k, 1.0f, args.x,
                   args.ldx, args.w + column * args.k, args.k, 0.0f, args.y + column, args.ldy);
  }
  if (status != dnnl_success) {
    // Only sizes that REQUIRES excludes, or memory for its packing running out, get here. There is
    // no result to go on with.
    LogError("sgemm_failed",
             {{"status", static_cast<int>(status)}, {"m", args.m}, {"n", args.n}, {"k", args.k}});
    std::abort();
  }
}

}  // namespace epserve::runtime
