#include "runtime/alltoallv/nccl_lanes.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "runtime/base/status.h"

namespace epserve::runtime {
namespace {

// NCCL's threads take 0.1 to 0.2 ms for a group, and seconds for a communicator: at first this
// thread keeps asking, then it pauses a quarter of what it has waited.
constexpr absl::Duration kEagerWait = absl::Milliseconds(1);
constexpr absl::Duration kLongestPause = absl::Milliseconds(5);

void PauseAfter(absl::Duration waited) {
  if (waited < kEagerWait) {
    std::this_thread::yield();
  } else {
    absl::SleepFor(std::min(waited / 4, kLongestPause));
  }
}

// NCCL says "in progress" of what its own threads carry on with.
bool Failed(ncclResult_t result) { return result != ncclSuccess && result != ncclInProgress; }

}  // namespace

NcclLanes::NcclLanes(const NcclApi& api, const NcclLanesConfig& config)
    : api_(api), config_(config) {
  for (int lane = 0; lane < config.num_lanes; ++lane) lanes_.push_back(std::make_unique<Lane>());
}

NcclLanes::~NcclLanes() { Abort(); }

ncclConfig_t NcclLanes::CommConfig() const {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.minCTAs = 1;
  config.maxCTAs = config_.max_blocks;
  return config;
}

absl::Status NcclLanes::Aborted(const char* call) const {
  return absl::AbortedError(
      absl::StrCat("nccl: ", call, ": rank ", config_.rank, " was told to stop"));
}

absl::Status NcclLanes::Open(const ncclUniqueId& id, const Deadline& deadline) {
  absl::Status status = Join(id, deadline);
  for (std::size_t lane = 1; status.ok() && lane < lanes_.size(); ++lane) {
    status = Split(*lanes_[lane], deadline);
  }
  if (!absl::IsDeadlineExceeded(status)) return status;
  return absl::UnavailableError(absl::StrCat("open peers: rank ", config_.rank, " of ",
                                             config_.num_ranks,
                                             " waited in vain for the others: ", status.message()));
}

absl::Status NcclLanes::Join(const ncclUniqueId& id, const Deadline& deadline) {
  constexpr char kCall[] = "ncclCommInitRankConfig";
  Lane& first = *lanes_.front();
  {
    const std::lock_guard lock(first.mutex);
    if (aborted_) return Aborted(kCall);
    ncclConfig_t config = CommConfig();
    const ncclResult_t result =
        api_.CommInitRankConfig(&first.comm, config_.num_ranks, id, config_.rank, &config);
    if (Failed(result)) return NcclStatus(api_, result, kCall, nullptr);
  }
  return Settle(first, kCall, deadline);
}

absl::Status NcclLanes::Split(Lane& to, const Deadline& deadline) {
  constexpr char kCall[] = "ncclCommSplit";
  Lane& first = *lanes_.front();
  {
    const std::scoped_lock lock(first.mutex, to.mutex);
    if (aborted_) return Aborted(kCall);
    ncclConfig_t config = CommConfig();
    const ncclResult_t result =
        api_.CommSplit(first.comm, /*color=*/0, /*key=*/config_.rank, &to.comm, &config);
    if (Failed(result)) return NcclStatus(api_, result, kCall, first.comm);
  }
  EPS_RETURN_IF_ERROR(Settle(first, kCall, deadline));
  return Settle(to, kCall, deadline);
}

absl::Status NcclLanes::EnqueueGroup(Lane& lane, std::span<const NcclTransfer> transfers,
                                     cudaStream_t stream, bool* in_progress) {
  const std::lock_guard lock(lane.mutex);
  if (aborted_) return Aborted("ncclGroupStart");
  if (lane.comm == nullptr) {
    return absl::FailedPreconditionError("nccl: no communicator is open; call Open first");
  }
  EPS_RETURN_IF_ERROR(NcclStatus(api_, api_.GroupStart(), "ncclGroupStart", lane.comm));
  ncclResult_t enqueued = ncclSuccess;
  for (const NcclTransfer& t : transfers) {
    if (!Failed(enqueued) && t.send_bytes > 0) {
      enqueued = api_.Send(t.send, t.send_bytes, ncclInt8, t.peer, lane.comm, stream);
    }
    if (!Failed(enqueued) && t.recv_bytes > 0) {
      enqueued = api_.Recv(t.recv, t.recv_bytes, ncclInt8, t.peer, lane.comm, stream);
    }
  }
  // Also after an error: a group that was begun must end.
  const ncclResult_t ended = api_.GroupEnd();
  if (Failed(enqueued)) return NcclStatus(api_, enqueued, "ncclSend or ncclRecv", lane.comm);
  if (Failed(ended)) return NcclStatus(api_, ended, "ncclGroupEnd", lane.comm);
  *in_progress = ended == ncclInProgress;
  return absl::OkStatus();
}

absl::Status NcclLanes::Exchange(int lane, std::span<const NcclTransfer> transfers,
                                 cudaStream_t stream, absl::Duration timeout) {
  Lane& used = *lanes_[static_cast<std::size_t>(lane)];
  bool in_progress = false;
  EPS_RETURN_IF_ERROR(EnqueueGroup(used, transfers, stream, &in_progress));
  if (!in_progress) return absl::OkStatus();
  // What the caller enqueues next must come after the transfers, so they have to be there.
  return Settle(used, "ncclGroupEnd", Deadline(timeout));
}

absl::Status NcclLanes::Settle(Lane& lane, const char* call, const Deadline& deadline) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    {
      const std::lock_guard lock(lane.mutex);
      if (aborted_ || lane.comm == nullptr) return Aborted(call);
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = api_.CommGetAsyncError(lane.comm, &state);
      if (Failed(asked)) return NcclStatus(api_, asked, "ncclCommGetAsyncError", lane.comm);
      if (state != ncclInProgress) return NcclStatus(api_, state, call, lane.comm);
    }
    const absl::Duration waited = absl::FromChrono(std::chrono::steady_clock::now() - start);
    if (deadline.passed()) {
      return absl::DeadlineExceededError(absl::StrCat("nccl: ", call, " has not ended within ",
                                                      absl::ToDoubleMilliseconds(waited),
                                                      " ms on rank ", config_.rank));
    }
    PauseAfter(waited);
  }
}

absl::Status NcclLanes::CheckErrors() const {
  for (const auto& lane : lanes_) {
    const std::lock_guard lock(lane->mutex);
    if (aborted_ || lane->comm == nullptr) continue;
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = api_.CommGetAsyncError(lane->comm, &state);
    const ncclResult_t found = asked == ncclSuccess ? state : asked;
    if (Failed(found)) return NcclStatus(api_, found, "a transfer", lane->comm);
  }
  return absl::OkStatus();
}

void NcclLanes::Abort() {
  aborted_ = true;
  std::vector<ncclComm_t> comms;
  for (const auto& lane : lanes_) {
    const std::lock_guard lock(lane->mutex);
    if (lane->comm != nullptr) comms.push_back(lane->comm);
    lane->comm = nullptr;
  }
  if (comms.empty()) return;
  // In one group, so that every communicator's kernels are told to end before the memory of any is
  // given back, which waits for the whole device. What the calls return cannot be acted on, for the
  // communicators are gone in any case; but whoever looks for memory that was not ready to go finds
  // it in the log.
  const auto call = [this](const char* name, ncclResult_t result) {
    if (result == ncclSuccess) return;
    LogWarning("nccl_abort", {{"call", name},
                              {"rank", config_.rank},
                              {"result", std::string(api_.GetErrorString(result))}});
  };
  call("ncclGroupStart", api_.GroupStart());
  for (ncclComm_t comm : comms) call("ncclCommAbort", api_.CommAbort(comm));
  call("ncclGroupEnd", api_.GroupEnd());
}

}  // namespace epserve::runtime
