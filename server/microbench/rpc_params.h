// What `epserve-microbench rpc` measures, and with how much of it.
#ifndef EPSERVE_SERVER_MICROBENCH_RPC_PARAMS_H_
#define EPSERVE_SERVER_MICROBENCH_RPC_PARAMS_H_

#include <cstdint>

namespace epserve::microbench {

struct RpcBenchParams {
  int num_workers = 4;
  std::int64_t message_bytes = 64;
  std::int64_t inline_bytes = std::int64_t{4096} * 7168 * 2;  // a prefill batch of bf16 rows
  std::int64_t request_bytes = 1200;  // `epserve bench --tokens 1` at H 512, K 2
  int concurrency = 64;
  int iterations = 2000;
  int warmup = 200;
  int inline_iterations = 10;
  int requests = 30'000;  // of each throughput measured
};

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_RPC_PARAMS_H_
