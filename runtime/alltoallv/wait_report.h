// What a device wait that gave up says, as the Status that reaches the host's callers. Pure.
#ifndef EPSERVE_RUNTIME_ALLTOALLV_WAIT_REPORT_H_
#define EPSERVE_RUNTIME_ALLTOALLV_WAIT_REPORT_H_

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "runtime/alltoallv/cuda_kernels.h"

namespace epserve::runtime {

// OK: no wait of `rank` has given up. Else DEADLINE_EXCEEDED or ABORTED, naming stage, ranks and
// how long. The device may be writing the report.
absl::Status StatusOfWaits(WaitReport* report, int rank, absl::Duration peer_timeout);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_ALLTOALLV_WAIT_REPORT_H_
