// The figures of `epserve-microbench rpc`, and what is printed of them. Pure functions.
#ifndef EPSERVE_SERVER_MICROBENCH_RPC_REPORT_H_
#define EPSERVE_SERVER_MICROBENCH_RPC_REPORT_H_

#include <string>

#include "runtime/microbench/report.h"
#include "server/microbench/rpc_params.h"

namespace epserve::microbench {

// One kind of call over one kind of address.
struct CallFigures {
  runtime::Percentiles round_trip;           // of a small message there and back
  runtime::Percentiles inline_echo;          // of a large one
  double requests_per_second = 0.0;          // small requests, several under way, from one thread
  double threads_requests_per_second = 0.0;  // from a thread for each
};

struct TransportFigures {
  CallFigures stream;
  CallFigures unary;
  // From a server to one client, or to all, and the last of the answers back.
  runtime::Percentiles one_worker;
  runtime::Percentiles all_workers;
};

struct RpcBenchReport {
  RpcBenchParams params;
  std::string grpc_version;
  TransportFigures unix_socket;
  TransportFigures tcp;
};

std::string FormatRpcJson(const RpcBenchReport& report);   // one line
std::string FormatRpcTable(const RpcBenchReport& report);  // for people

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_RPC_REPORT_H_
