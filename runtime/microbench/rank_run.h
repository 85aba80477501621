// One rank's process: sets its heap up, then copies, dispatches and combines in step with the
// others, and leaves its time stamps in the control block.
#ifndef EPSERVE_RUNTIME_MICROBENCH_RANK_RUN_H_
#define EPSERVE_RUNTIME_MICROBENCH_RANK_RUN_H_

#include "absl/status/status.h"
#include "runtime/alltoallv/exchange.h"
#include "runtime/microbench/coordination.h"

namespace epserve::runtime {

// The first error is also left in the rank's entry of the block.
absl::Status RunBenchRank(const Coordination& coordination, int rank);

// The exchange's configuration that the parameters ask for; what the launcher validates.
ExchangeConfig BenchExchangeConfig(const BenchParams& params, int rank);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_RANK_RUN_H_
