#include "client/command/readiness_watch.h"

#include <utility>

namespace epserve::client {

namespace {

// Often while the start is watched; seldom once it serves, where a call costs others time.
constexpr absl::Duration kStartingInterval = absl::Milliseconds(50);
constexpr absl::Duration kServingInterval = absl::Milliseconds(500);
// The service is on this machine: a restarted one is to be found at once. With gRPC's spread of a
// fifth, attempts are at most 240 ms apart.
constexpr absl::Duration kMaxReconnectBackoff = absl::Milliseconds(200);

}  // namespace

ReadinessWatch::ReadinessWatch(const std::string& target, const ChannelSecurity& security)
    : client_(ClientOptions{
          .target = target, .security = security, .max_reconnect_backoff = kMaxReconnectBackoff}),
      admin_(target, security, kMaxReconnectBackoff),
      thread_([this] { Run(); }) {}

ReadinessWatch::~ReadinessWatch() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

ReadinessSnapshot ReadinessWatch::Latest() const {
  absl::MutexLock lock(&mutex_);
  return latest_;
}

void ReadinessWatch::Run() {
  while (true) {
    ReadinessSnapshot snapshot;
    const auto ready = client_.IsReady(kCallTimeout);
    snapshot.ready = ready.ok() && *ready;
    auto cluster = admin_.GetClusterStatus(kCallTimeout);
    if (cluster.ok()) snapshot.cluster = std::move(cluster).value();
    const absl::Duration interval = snapshot.ready ? kServingInterval : kStartingInterval;
    absl::MutexLock lock(&mutex_);
    latest_ = std::move(snapshot);
    if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), interval)) return;
  }
}

}  // namespace epserve::client
