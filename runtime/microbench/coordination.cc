#include "runtime/microbench/coordination.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

constexpr std::uint64_t kSpansOffset = (sizeof(ControlBlock) + 63) / 64 * 64;

std::uint64_t BlockBytes(const BenchParams& params) {
  return kSpansOffset + static_cast<std::uint64_t>(kNumPhases) * params.iterations *
                            params.num_ranks * sizeof(TimeSpan);
}

absl::Status SystemError(const char* call) {
  return absl::InternalError(
      absl::StrCat("control block: ", call, " failed: ", std::strerror(errno)));
}

}  // namespace

absl::StatusOr<Coordination> Coordination::Create(const BenchParams& params) {
  UniqueFd fd(::memfd_create("epserve-microbench", MFD_CLOEXEC));
  if (!fd.valid()) return SystemError("memfd_create");
  const std::uint64_t bytes = BlockBytes(params);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return SystemError("ftruncate");
  EPS_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(fd, bytes));
  auto* block = new (mapping.data()) ControlBlock;
  block->params = params;
  return Coordination(std::move(fd), std::move(mapping));
}

absl::StatusOr<Coordination> Coordination::Open(UniqueFd fd) {
  struct stat info;
  if (!fd.valid() || ::fstat(fd.get(), &info) != 0) return SystemError("fstat");
  const auto bytes = static_cast<std::uint64_t>(info.st_size);
  if (bytes < kSpansOffset) {
    return absl::InvalidArgumentError(
        absl::StrCat("control block: ", bytes, " bytes are fewer than its ", kSpansOffset));
  }
  EPS_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(fd, bytes));
  Coordination coordination(std::move(fd), std::move(mapping));
  if (BlockBytes(coordination.params()) != bytes) {
    return absl::InvalidArgumentError("control block: its size is not that of its parameters");
  }
  return coordination;
}

TimeSpan& Coordination::span(Phase phase, int iteration, int rank) const {
  auto* spans = reinterpret_cast<TimeSpan*>(mapping_.data() + kSpansOffset);
  const auto row = static_cast<std::int64_t>(phase) * params().iterations + iteration;
  return spans[row * params().num_ranks + rank];
}

absl::Status Coordination::Barrier(std::uint64_t* passed) const {
  ControlBlock& shared = block();
  const auto ranks = static_cast<std::uint64_t>(params().num_ranks);
  const std::uint64_t target = ++*passed;
  // Acquire and release: what any rank wrote before its arrival is seen by the last one to arrive,
  // whose Publish passes it on to all.
  if (shared.arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 == target * ranks) {
    Publish(&shared.barrier, target);
    return absl::OkStatus();
  }
  const WaitLimits limits{
      std::chrono::steady_clock::now() + std::chrono::milliseconds(params().peer_timeout_ms),
      &shared.abort};
  switch (WaitForValue(&shared.barrier, target, limits)) {
    case WaitResult::kReached:
      return absl::OkStatus();
    case WaitResult::kAborted:
      return absl::AbortedError("barrier: another rank has ended");
    case WaitResult::kTimedOut:
      break;
  }
  return absl::DeadlineExceededError(absl::StrCat(
      "barrier: not all ranks came within peer_timeout ", params().peer_timeout_ms, " ms"));
}

}  // namespace epserve::runtime
