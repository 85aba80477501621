// The command line and environment of epserve-microbench, parsed strictly.
#ifndef EPSERVE_SERVER_MICROBENCH_OPTIONS_H_
#define EPSERVE_SERVER_MICROBENCH_OPTIONS_H_

#include <optional>
#include <string>

#include "runtime/microbench/coordination.h"
#include "runtime/microbench/ffn_report.h"
#include "server/microbench/rpc_params.h"

namespace epserve::microbench {

// What the program exits with where its flags are wrong.
inline constexpr int kUsageExitCode = 2;

enum class Command {
  kAllToAllV,
  kFfn,
  kRpc,
  // Those of the processes that the program starts of itself.
  kRank,
  kRpcEcho,
  kRpcWorker
};

struct MicrobenchOptions {
  Command command = Command::kAllToAllV;
  bool json = false;
  runtime::BenchParams params;  // alltoallv
  runtime::FfnBenchParams ffn;
  RpcBenchParams rpc;
  int rank = 0;  // kRank
  int control_fd = -1;
  std::string socket;  // kRpcEcho
  std::string target;  // kRpcWorker
};

// Nothing where the program is to end at once, with `exit_code`: after --help and --version (0) and
// after a usage error (kUsageExitCode), all of which have been printed.
std::optional<MicrobenchOptions> ParseMicrobenchOptions(int argc, char** argv, int* exit_code);

// Prints to stdout. The program's exit code: success only where all of it got out.
int Print(const std::string& text);

}  // namespace epserve::microbench

#endif  // EPSERVE_SERVER_MICROBENCH_OPTIONS_H_
