// What gRPC itself takes on this machine: the floor under every figure of the service. Bare gRPC in
// C++, messages as bytes, one process a peer.
#ifndef EPSERVE_SERVER_MICROBENCH_RPC_BENCH_H_
#define EPSERVE_SERVER_MICROBENCH_RPC_BENCH_H_

#include "absl/status/statusor.h"
#include "server/microbench/rpc_params.h"
#include "server/microbench/rpc_report.h"

namespace epserve::microbench {

// Runs the whole measurement. A peer that dies ends it with an error. Leaves no process and no
// file.
absl::StatusOr<RpcBenchReport> RunRpcBench(const RpcBenchParams& params);

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_RPC_BENCH_H_
