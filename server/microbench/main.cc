// epserve-microbench: what the service is made of, measured. See --help.
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "runtime/microbench/ffn_bench.h"
#include "runtime/microbench/launcher.h"
#include "runtime/microbench/rank_run.h"
#include "runtime/microbench/spawn_self.h"
#include "server/microbench/child_process.h"
#include "server/microbench/echo_peer.h"
#include "server/microbench/options.h"
#include "server/microbench/rpc_bench.h"

namespace epserve::microbench {
namespace {

int RunAsRank(const MicrobenchOptions& options) {
  auto coordination = runtime::Coordination::Open(runtime::UniqueFd(options.control_fd));
  const absl::Status status = coordination.ok() ? runtime::RunBenchRank(*coordination, options.rank)
                                                : coordination.status();
  if (status.ok()) return EXIT_SUCCESS;
  if (!coordination.ok()) {
    std::fprintf(stderr, "epserve-microbench: %s\n", status.ToString().c_str());
  }
  return EXIT_FAILURE;  // Where there is a block, the launcher finds the error in it.
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "epserve-microbench: %s\n", status.ToString().c_str());
  return absl::IsInvalidArgument(status) ? kUsageExitCode : EXIT_FAILURE;
}

int RunAsLauncher(const MicrobenchOptions& options) {
  const auto report = runtime::RunAllToAllV(options.params);
  if (!report.ok()) return Fail(report.status());
  return Print(options.json ? runtime::FormatJson(*report) + "\n" : runtime::FormatTable(*report));
}

int RunFfn(const MicrobenchOptions& options) {
#ifdef EPSERVE_WITH_CUDA
  const auto report = runtime::RunFfnBench(options.ffn);
  if (!report.ok()) return Fail(report.status());
  return Print(options.json ? runtime::FormatFfnJson(*report) + "\n"
                            : runtime::FormatFfnTable(*report));
#else
  (void)options;
  return Fail(absl::UnavailableError("ffn: this build has no CUDA; build it where nvcc is"));
#endif
}

int RunRpc(const MicrobenchOptions& options) {
  const auto report = RunRpcBench(options.rpc);
  if (!report.ok()) return Fail(report.status());
  return Print(options.json ? FormatRpcJson(*report) + "\n" : FormatRpcTable(*report));
}

int RunAsPeer(const absl::Status& ended) { return ended.ok() ? EXIT_SUCCESS : Fail(ended); }

int Run(const MicrobenchOptions& options) {
  switch (options.command) {
    case Command::kAllToAllV:
      return RunAsLauncher(options);
    case Command::kFfn:
      return RunFfn(options);
    case Command::kRpc:
      return RunRpc(options);
    case Command::kRank:
      EndWithParent();
      return RunAsRank(options);
    case Command::kRpcEcho:
      EndWithParent();
      return RunAsPeer(ServeEcho(options.socket, runtime::kChildFd));
    case Command::kRpcWorker:
      EndWithParent();
      return RunAsPeer(WorkAsEcho(options.target));
  }
  return EXIT_FAILURE;
}

}  // namespace
}  // namespace epserve::microbench

int main(int argc, char** argv) {
  int exit_code = EXIT_SUCCESS;
  const auto options = epserve::microbench::ParseMicrobenchOptions(argc, argv, &exit_code);
  return options.has_value() ? epserve::microbench::Run(*options) : exit_code;
}
