#include "runtime/alltoallv/nccl_watch.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::runtime {
namespace {

// Often enough that a timeout is overrun by little, seldom enough to cost nothing.
std::chrono::nanoseconds PeriodFor(absl::Duration timeout) {
  return absl::ToChronoNanoseconds(
      std::clamp(timeout / 16, absl::Milliseconds(1), absl::Milliseconds(50)));
}

}  // namespace

NcclWatch::NcclWatch(NcclWatchConfig config)
    : config_(std::move(config)), thread_([this] { Run(); }) {}

NcclWatch::~NcclWatch() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

absl::Status NcclWatch::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

void NcclWatch::Abort() {
  {
    const std::lock_guard lock(mutex_);
    abort_ = true;
  }
  wake_.notify_all();
}

absl::Status NcclWatch::Look(std::vector<Seen>& seen) const {
  const auto now = std::chrono::steady_clock::now();
  for (std::size_t i = 0; i < seen.size(); ++i) {
    const std::uint64_t count = config_.words[i];
    if (count != seen[i].count) seen[i] = {count, now};
    const absl::Duration waited = absl::FromChrono(now - seen[i].since);
    if (count % 2 == 0 || waited < config_.timeout) continue;
    return absl::DeadlineExceededError(absl::StrCat(
        config_.stages[i], ": rank ", config_.rank, " waited ", absl::ToDoubleMilliseconds(waited),
        " ms for its peers, longer than the peer timeout of ",
        absl::ToDoubleMilliseconds(config_.timeout), " ms"));
  }
  return config_.check_errors();
}

void NcclWatch::Run() {
  std::vector<Seen> seen(config_.words.size(), Seen{0, std::chrono::steady_clock::now()});
  const auto period = PeriodFor(config_.timeout);
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait_for(lock, period, [this] { return stop_ || abort_; });
    if (stop_) return;
    absl::Status found;
    if (abort_) {
      found = absl::AbortedError(
          absl::StrCat("exchange: rank ", config_.rank, " was told to stop its transfers"));
    } else {
      lock.unlock();
      found = Look(seen);
      lock.lock();
    }
    if (found.ok()) continue;
    // First: whoever finds the device done after the abort must find out why.
    status_ = std::move(found);
    lock.unlock();
    config_.abort();
    return;
  }
}

}  // namespace epserve::runtime
