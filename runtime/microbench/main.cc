// epserve-microbench: the runtime alone, measured. See --help.
#include <signal.h>
#include <sys/prctl.h>

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "runtime/microbench/ffn_bench.h"
#include "runtime/microbench/launcher.h"
#include "runtime/microbench/options.h"
#include "runtime/microbench/rank_run.h"

namespace epserve::runtime {
namespace {

int RunAsRank(const MicrobenchOptions& options) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // No rank outlives the program that started it.
  auto coordination = Coordination::Open(UniqueFd(options.control_fd));
  const absl::Status status =
      coordination.ok() ? RunBenchRank(*coordination, options.rank) : coordination.status();
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

int Print(const std::string& text) {
  return std::fputs(text.c_str(), stdout) >= 0 && std::fflush(stdout) == 0 ? EXIT_SUCCESS
                                                                           : EXIT_FAILURE;
}

int RunAsLauncher(const MicrobenchOptions& options) {
  const auto report = RunAllToAllV(options.params);
  if (!report.ok()) return Fail(report.status());
  return Print(options.json ? FormatJson(*report) + "\n" : FormatTable(*report));
}

int RunFfn(const MicrobenchOptions& options) {
#ifdef EPSERVE_WITH_CUDA
  const auto report = RunFfnBench(options.ffn);
  if (!report.ok()) return Fail(report.status());
  return Print(options.json ? FormatFfnJson(*report) + "\n" : FormatFfnTable(*report));
#else
  (void)options;
  return Fail(absl::UnavailableError("ffn: this build has no CUDA; build it where nvcc is"));
#endif
}

}  // namespace
}  // namespace epserve::runtime

int main(int argc, char** argv) {
  int exit_code = EXIT_SUCCESS;
  const auto options = epserve::runtime::ParseMicrobenchOptions(argc, argv, &exit_code);
  if (!options.has_value()) return exit_code;
  if (options->is_ffn) return epserve::runtime::RunFfn(*options);
  return options->is_rank ? epserve::runtime::RunAsRank(*options)
                          : epserve::runtime::RunAsLauncher(*options);
}
