// An NCCL without GPUs: notes each call, and answers as a test has told it. Only one at a time, for
// NCCL's functions have no object of their own. Thread-safe.
#ifndef EPSERVE_TESTS_RUNTIME_ALLTOALLV_FAKE_NCCL_H_
#define EPSERVE_TESTS_RUNTIME_ALLTOALLV_FAKE_NCCL_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/alltoallv/nccl_api.h"

namespace epserve::testing {

class FakeNccl {
 public:
  FakeNccl() { current_ = this; }
  ~FakeNccl() { current_ = nullptr; }
  FakeNccl(const FakeNccl&) = delete;
  FakeNccl& operator=(const FakeNccl&) = delete;

  runtime::NcclApi api() const {
    runtime::NcclApi api;
    api.GetErrorString = [](ncclResult_t) { return "an error"; };
    api.GetLastError = [](ncclComm_t) { return "its cause"; };
    api.CommInitRankConfig = InitRank;
    api.CommSplit = Split;
    api.CommAbort = [](ncclComm_t comm) { return Note(absl::StrCat("abort ", Number(comm))); };
    api.CommGetAsyncError = AsyncError;
    api.Send = Send;
    api.Recv = Recv;
    api.GroupStart = [] { return Note("start"); };
    api.GroupEnd = GroupEnd;
    return api;
  }

  // What CommGetAsyncError answers: `in_progress` times, or for ever where it is negative, that
  // NCCL is still at it, then `state`.
  void Answer(int in_progress, ncclResult_t state) {
    const std::lock_guard lock(mutex_);
    in_progress_ = in_progress;
    state_ = state;
  }
  void FailSends() {
    const std::lock_guard lock(mutex_);
    send_ = ncclInvalidArgument;
  }
  void EndGroupsLater() {
    const std::lock_guard lock(mutex_);
    group_end_ = ncclInProgress;
  }

  std::vector<std::string> TakeCalls() {
    const std::lock_guard lock(mutex_);
    return std::exchange(calls_, {});
  }
  int num_polls() const {
    const std::lock_guard lock(mutex_);
    return num_polls_;
  }
  ncclConfig_t config() const {  // of the last communicator
    const std::lock_guard lock(mutex_);
    return config_;
  }

 private:
  // Communicators are numbers from 1.
  static int Number(ncclComm_t comm) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(comm));
  }
  static ncclResult_t Note(const std::string& call) {
    const std::lock_guard lock(current_->mutex_);
    current_->calls_.push_back(call);
    return ncclSuccess;
  }
  static ncclComm_t Make(const ncclConfig_t* config) {
    const std::lock_guard lock(current_->mutex_);
    current_->config_ = *config;
    return reinterpret_cast<ncclComm_t>(static_cast<std::uintptr_t>(++current_->num_comms_));
  }
  static ncclResult_t InitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int rank,
                               ncclConfig_t* config) {
    *comm = Make(config);
    Note(absl::StrCat("init ", rank, " of ", num_ranks, " by ", id.internal));
    return ncclInProgress;
  }
  static ncclResult_t Split(ncclComm_t parent, int color, int key, ncclComm_t* comm,
                            ncclConfig_t* config) {
    *comm = Make(config);
    Note(absl::StrCat("split ", Number(parent), " color ", color, " key ", key));
    return ncclInProgress;
  }
  static ncclResult_t AsyncError(ncclComm_t, ncclResult_t* state) {
    const std::lock_guard lock(current_->mutex_);
    ++current_->num_polls_;
    const bool busy = current_->in_progress_ != 0;
    if (current_->in_progress_ > 0) --current_->in_progress_;
    *state = busy ? ncclInProgress : current_->state_;
    return ncclSuccess;
  }
  static ncclResult_t Send(const void*, std::size_t count, ncclDataType_t, int peer,
                           ncclComm_t comm, cudaStream_t) {
    Note(absl::StrCat("send ", count, " to ", peer, " on ", Number(comm)));
    const std::lock_guard lock(current_->mutex_);
    return current_->send_;
  }
  static ncclResult_t Recv(void*, std::size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                           cudaStream_t) {
    return Note(absl::StrCat("recv ", count, " from ", peer, " on ", Number(comm)));
  }
  static ncclResult_t GroupEnd() {
    Note("end");
    const std::lock_guard lock(current_->mutex_);
    return current_->group_end_;
  }

  inline static FakeNccl* current_ = nullptr;

  mutable std::mutex mutex_;
  std::vector<std::string> calls_;
  int num_comms_ = 0;
  int num_polls_ = 0;
  int in_progress_ = 0;
  ncclResult_t state_ = ncclSuccess;
  ncclResult_t send_ = ncclSuccess;
  ncclResult_t group_end_ = ncclSuccess;
  ncclConfig_t config_ = NCCL_CONFIG_INITIALIZER;
};

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_RUNTIME_ALLTOALLV_FAKE_NCCL_H_
