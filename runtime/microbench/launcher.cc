#include "runtime/microbench/launcher.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/host_exchange.h"
#include "runtime/base/status.h"
#include "runtime/microbench/memory_check.h"
#include "runtime/microbench/rank_run.h"
#include "runtime/microbench/spawn_self.h"
#include "runtime/symmetric/stale_heaps.h"

namespace epserve::runtime {
namespace {

absl::StatusOr<pid_t> StartRank(const Coordination& coordination, int rank) {
  return SpawnSelf(
      {"alltoallv-rank", absl::StrCat("--rank=", rank), absl::StrCat("--control-fd=", kChildFd)},
      coordination.fd());
}

// Reaps every rank. The first that ends badly makes the others end too.
absl::Status ReapRanks(const Coordination& coordination, const std::vector<pid_t>& pids) {
  absl::Status first;
  for (std::size_t reaped = 0; reaped < pids.size(); ++reaped) {
    int state = 0;
    pid_t pid;
    do {
      pid = ::waitpid(-1, &state, 0);
    } while (pid < 0 && errno == EINTR);
    if (pid < 0) {
      return absl::InternalError(absl::StrCat("waitpid failed: ", std::strerror(errno)));
    }
    if (WIFEXITED(state) && WEXITSTATUS(state) == 0) continue;
    // Relaxed: the word orders nothing, it only ends the others' waits.
    coordination.block().abort.store(1, std::memory_order_relaxed);
    if (!first.ok()) continue;
    const auto rank = std::find(pids.begin(), pids.end(), pid) - pids.begin();
    const std::string error = coordination.rank(static_cast<int>(rank)).error;
    const std::string how = WIFSIGNALED(state) ? absl::StrCat("killed by signal ", WTERMSIG(state))
                                               : absl::StrCat("exit ", WEXITSTATUS(state));
    first = absl::InternalError(absl::StrCat("rank ", rank, ": ", error.empty() ? how : error));
  }
  return first;
}

// What the ranks take together beside their heaps, which refuse by themselves: rows and outputs,
// and in each rank the ids of all.
double WorkloadBytes(const BenchParams& params) {
  const auto ranks = static_cast<double>(params.num_ranks);
  const auto tokens = static_cast<double>(params.tokens_per_rank);
  const double rows = 2 * tokens * static_cast<double>(params.hidden) *
                      static_cast<double>(DataTypeBytes(params.dtype));
  const double ids = (ranks + 2) * tokens * params.topk * sizeof(std::int32_t);
  return ranks * (rows + ids);
}

absl::Status ValidateDeviceParams(const BenchParams& params) {
  if (params.backend == BenchBackend::kHost && (params.decode || params.fp8)) {
    return absl::InvalidArgumentError(
        "alltoallv: --mode=decode and --fp8 are not the host backend's; use --backend=cuda or "
        "nccl");
  }
  if (params.fp8 && params.dtype != DataType::kBf16) {
    return absl::InvalidArgumentError("alltoallv: --fp8 casts bf16 rows; use --dtype=bf16");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<BenchReport> RunAllToAllV(BenchParams params) {
  params.owner_pid = static_cast<std::uint64_t>(::getpid());
  if (params.topk > params.num_experts) {
    return absl::InvalidArgumentError(absl::StrCat("alltoallv: topk ", params.topk,
                                                   " exceeds experts ", params.num_experts,
                                                   "; a token's experts are all different"));
  }
  const ExchangeConfig config = BenchExchangeConfig(params, 0);
  EPS_RETURN_IF_ERROR(ValidateExchangeConfig(config));
  EPS_RETURN_IF_ERROR(ValidateDeviceParams(params));
  EPS_RETURN_IF_ERROR(
      CheckMemoryFor("alltoallv", WorkloadBytes(params), "--ranks, --tokens, --hidden or --topk"));
  EPS_ASSIGN_OR_RETURN(const Coordination coordination, Coordination::Create(params));
  std::vector<pid_t> pids;
  absl::Status status;
  for (int rank = 0; rank < params.num_ranks && status.ok(); ++rank) {
    auto pid = StartRank(coordination, rank);
    if (pid.ok()) {
      pids.push_back(*pid);
    } else {
      status = pid.status();
      coordination.block().abort.store(1, std::memory_order_relaxed);
    }
  }
  const absl::Status reaped = ReapRanks(coordination, pids);
  if (status.ok()) status = reaped;
  // Only a rank that died before all had opened its heap leaves one.
  const auto reclaimed = ReclaimStaleHeaps(config.cluster_id);
  EPS_RETURN_IF_ERROR(status);
  EPS_RETURN_IF_ERROR(reclaimed.status());
  return MakeReport(coordination);
}

}  // namespace epserve::runtime
