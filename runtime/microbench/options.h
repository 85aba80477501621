// The command line and environment of epserve-microbench, parsed strictly.
#ifndef EPSERVE_RUNTIME_MICROBENCH_OPTIONS_H_
#define EPSERVE_RUNTIME_MICROBENCH_OPTIONS_H_

#include <optional>

#include "runtime/microbench/coordination.h"
#include "runtime/microbench/ffn_report.h"

namespace epserve::runtime {

// What the program exits with where its flags are wrong.
inline constexpr int kUsageExitCode = 2;

struct MicrobenchOptions {
  BenchParams params;
  bool is_ffn = false;  // ffn, with these parameters; else alltoallv
  FfnBenchParams ffn;
  bool json = false;
  // Set in the processes that the program starts of itself, one a rank.
  bool is_rank = false;
  int rank = 0;
  int control_fd = -1;
};

// Nothing where the program is to end at once, with `exit_code`: after --help and --version (0) and
// after a usage error (kUsageExitCode), all of which have been printed.
std::optional<MicrobenchOptions> ParseMicrobenchOptions(int argc, char** argv, int* exit_code);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_MICROBENCH_OPTIONS_H_
