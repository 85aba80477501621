// Clients' CUDA memory: what the host does between the front door, the workers and DeviceRegions.
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/coordinator/host.h"

namespace epserve::coordinator {
namespace {

// For the batches in flight to end and the workers to answer: opening takes milliseconds.
constexpr TimeUs kHoldTimeoutUs = 10'000'000;

absl::Status Stopped() {
  return absl::UnavailableError(
      "shared memory: the coordinator shuts down; its workers close what they have open");
}

}  // namespace

void Host::OpenDeviceRegion(std::shared_ptr<const ShmRegion> region, Done done) {
  Post(Query([this, region = std::move(region), done = std::move(done)](bool stopped) {
    if (stopped) return done(Stopped());
    device_regions_.Open(region, done);
  }));
}

void Host::CloseDeviceRegions(std::vector<std::uint64_t> regions, Done done) {
  Post(Query([this, regions = std::move(regions), done = std::move(done)](bool stopped) {
    if (stopped) return done(Stopped());
    device_regions_.Close(regions, done);
  }));
}

void Host::SendTo(StreamId stream, StreamMessage message) { Send(stream, std::move(message)); }

void Host::HoldBatches(bool hold) {
  if (hold) return ApplyEvent(coordinator::HoldBatches{NowUs() + kHoldTimeoutUs});
  ApplyEvent(ReleaseBatches{});
}

// A batch ends or its epoch does within batch_timeout_us. What the workers then have to answer in
// is no longer than for others.
void Host::HoldBatchesToTheirEnd() {
  ApplyEvent(coordinator::HoldBatches{NowUs() + config_.batch_timeout_us + kHoldTimeoutUs,
                                      /*most_held_us=*/kHoldTimeoutUs});
}

std::string Host::NameOf(StreamId stream) const {
  const auto it = streams_.find(stream);
  if (it == streams_.end()) return "a lost worker";
  return absl::StrCat("rank ", it->second.rank, " (worker ", it->second.hello.worker_id, ")");
}

void Host::Execute(BatchesHeld& command) {
  if (command.expired) return device_regions_.OnHoldExpired();
  device_regions_.OnBatchesHeld();
}

void Host::LeaveRegions(StreamId stream) {
  batches_->regions().Leave(stream);
  device_regions_.Leave(stream);
}

}  // namespace epserve::coordinator
