#include "client/command/make_checkpoint.h"

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/command/format.h"
#include "client/command/interruption.h"
#include "client/command/progress.h"
#include "client/command/random_checkpoint.h"
#include "client/cpp/status.h"

namespace epserve::client {

absl::Status RunMakeCheckpoint(const MakeCheckpointOptions& options) {
  const absl::Time started = absl::Now();
  EPC_ASSIGN_OR_RETURN(const auto interruption, Interruption::Create());
  Progress progress("writing");
  const auto show = [&](std::uint64_t written, std::uint64_t total) {
    progress.Update(static_cast<double>(written) / static_cast<double>(total),
                    absl::StrCat(FormatBytes(written), " of ", FormatBytes(total)));
  };
  EPC_ASSIGN_OR_RETURN(const CheckpointSummary summary,
                       WriteRandomCheckpoint(options, show, interruption.get()));
  progress.Hide();
  std::printf("wrote %s: %s, %lld layers of %lld experts, top-%lld, H %lld, I %lld, %s\n",
              options.output_dir.c_str(), options.architecture.c_str(),
              static_cast<long long>(options.num_layers),
              static_cast<long long>(options.num_experts), static_cast<long long>(options.topk),
              static_cast<long long>(options.hidden), static_cast<long long>(options.intermediate),
              options.dtype.c_str());
  std::printf("  %s in %s tensors and %s %s, %s\n", FormatBytes(summary.bytes).c_str(),
              FormatCount(static_cast<std::uint64_t>(summary.num_tensors)).c_str(),
              FormatCount(static_cast<std::uint64_t>(summary.num_files)).c_str(),
              summary.num_files == 1 ? "file" : "files",
              FormatSeconds(absl::ToDoubleSeconds(absl::Now() - started)).c_str());
  return absl::OkStatus();
}

}  // namespace epserve::client
