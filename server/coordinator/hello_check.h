// Whether a worker may join: what must agree between the coordinator and every worker. Pure.
#ifndef EPSERVE_SERVER_COORDINATOR_HELLO_CHECK_H_
#define EPSERVE_SERVER_COORDINATOR_HELLO_CHECK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/coordinator/worker_stream.h"

namespace epserve::coordinator {

struct HelloPolicy {
  std::string version;  // the coordinator's own; a worker's may be one minor version off
  std::string fingerprint;
  std::int64_t max_batch_tokens = 0;
  int num_slots = 0;
  std::string cluster_id;
  std::int64_t hello_timeout_ms = 5000;  // from a stream's opening to its Hello
  std::vector<std::string> backends = {"host", "cuda", "nccl"};
};

// INVALID_ARGUMENT names the first thing that differs, and both sides' values.
absl::Status CheckHello(const HelloInfo& hello, const HelloPolicy& policy);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_HELLO_CHECK_H_
