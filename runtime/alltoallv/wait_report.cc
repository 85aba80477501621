#include "runtime/alltoallv/wait_report.h"

#include <atomic>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

const char* StageName(std::uint32_t stage) {
  switch (static_cast<WaitStage>(stage)) {
    case WaitStage::kDispatch:
      return "dispatch";
    case WaitStage::kCombine:
      return "combine";
    case WaitStage::kBarrier:
      return "barrier";
    case WaitStage::kCounts:
      return "counts";
    case WaitStage::kNone:
      break;
  }
  return "unknown stage";
}

}  // namespace

absl::Status StatusOfWaits(WaitReport* report, int rank, absl::Duration peer_timeout) {
  // acquire: pairs with the device's release in GivesUp, the other fields come after.
  const std::uint32_t stage = std::atomic_ref(report->stage).load(std::memory_order_acquire);
  if (stage == 0) return absl::OkStatus();
  const volatile WaitReport& fields = *report;
  const double waited_ms = static_cast<double>(fields.waited_ns) / 1e6;
  if (fields.aborted != 0) {
    return absl::AbortedError(absl::StrCat(StageName(stage), ": rank ", rank,
                                           " was told to stop while it waited for rank ",
                                           fields.peer, ", after ", waited_ms, " ms"));
  }
  return absl::DeadlineExceededError(absl::StrCat(
      StageName(stage), ": rank ", rank, " waited ", waited_ms, " ms for rank ", fields.peer,
      ", longer than the peer timeout of ", absl::ToDoubleMilliseconds(peer_timeout), " ms"));
}

}  // namespace epserve::runtime
