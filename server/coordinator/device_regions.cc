#include "server/coordinator/device_regions.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace epserve::coordinator {
namespace {

absl::Status Refusal(const char* operation, const std::string& label, const std::string& worker,
                     const absl::Status& why) {
  return absl::Status(why.code(), absl::StrCat(operation, ": region ", label, " is not open at ",
                                               worker, ": ", std::string(why.message())));
}

}  // namespace

DeviceRegionInfo DeviceRegions::InfoOf(const ShmRegion& region) {
  const ShmRegionInfo& info = region.info();
  return {info.id, region.label(), info.handle, info.device_id, info.size_bytes};
}

absl::Status DeviceRegions::CheckServing() const {
  if (serving_) return absl::OkStatus();
  return absl::UnavailableError(
      "register: CUDA shared memory is opened by the workers, and the service is not ready; retry "
      "when it is");
}

void DeviceRegions::Open(std::shared_ptr<const ShmRegion> region, Done done) {
  Operation operation;
  operation.ids = {region->info().id};
  operation.region = std::move(region);
  operation.done = std::move(done);
  Begin(std::move(operation));
}

void DeviceRegions::Close(std::vector<std::uint64_t> regions, Done done) {
  Operation operation;
  operation.ids = std::move(regions);
  operation.done = std::move(done);
  if (operation.ids.empty() && unclosed_.empty() && !IsClosingAsked()) {
    return operation.done(absl::OkStatus());
  }
  Begin(std::move(operation));
}

bool DeviceRegions::IsClosingAsked() const {
  const auto closes = [](const Operation& operation) { return operation.region == nullptr; };
  return (current_.has_value() && closes(*current_)) || std::ranges::any_of(waiting_, closes);
}

void DeviceRegions::Begin(Operation operation) {
  waiting_.push_back(std::move(operation));
  if (current_.has_value()) return;
  current_ = std::move(waiting_.front());
  waiting_.pop_front();
  HoldForCurrent();
}

void DeviceRegions::HoldForCurrent() {
  if (current_->follows) return actions_->HoldBatchesToTheirEnd();
  actions_->HoldBatches(true);
}

void DeviceRegions::OnBatchesHeld() {
  if (!current_.has_value() || current_->phase != Phase::kHolding) return;
  if (current_->region != nullptr) {
    BeginOpening();
  } else {
    BeginClosing();
  }
}

void DeviceRegions::BeginOpening() {
  current_->phase = Phase::kOpening;
  current_->outcome = CheckServing();
  if (!current_->outcome.ok()) return Finish();
  const std::uint64_t id = current_->ids.front();
  regions_[id] = current_->region;
  for (auto& [stream, open] : members_) {
    open.insert(id);
    current_->awaited.insert(stream);
    actions_->SendTo(stream, OpenDeviceRegionMessage{InfoOf(*current_->region)});
  }
  Advance();
}

void DeviceRegions::BeginClosing() {
  current_->phase = Phase::kClosing;
  current_->ids.insert(current_->ids.end(), unclosed_.begin(), unclosed_.end());
  unclosed_.clear();
  for (const std::uint64_t id : current_->ids) {
    regions_.erase(id);
    unusable_.erase(id);
  }
  for (auto& [stream, open] : members_) {
    CloseDeviceRegionsMessage message;
    for (const std::uint64_t id : current_->ids) {
      if (open.contains(id)) message.regions.push_back(id);
    }
    if (message.regions.empty()) continue;
    current_->awaited.insert(stream);
    actions_->SendTo(stream, std::move(message));
  }
  Advance();
}

void DeviceRegions::Advance() {
  if (!current_.has_value() || !current_->awaited.empty()) return;
  if (current_->phase == Phase::kOpening) return EndOpening();
  if (current_->phase == Phase::kClosing) Finish();
}

// The first refusal by name is told, whoever answered first.
void DeviceRegions::EndOpening() {
  if (current_->outcome.ok() && !current_->refusals.empty()) {
    const auto& [worker, why] = *current_->refusals.begin();
    current_->outcome = Refusal("register", current_->region->label(), worker, why);
  }
  if (current_->outcome.ok()) return Finish();
  BeginClosing();
}

void DeviceRegions::Finish() {
  Operation ended = *std::exchange(current_, std::nullopt);
  const absl::Status outcome = ended.outcome;
  End(std::move(ended), outcome);
}

// Tells the outcome, and goes on to the next operation. In between the batches that wait are let
// go: whoever registers without pause delays the others' requests by an operation at a time, and
// keeps none from being served.
void DeviceRegions::End(Operation ended, const absl::Status& outcome) {
  if (!waiting_.empty()) {
    current_ = std::move(waiting_.front());
    waiting_.pop_front();
  }
  ended.region = nullptr;
  ended.done(outcome);
  if (current_.has_value() && current_->phase != Phase::kHolding) return;  // done() began it.
  actions_->HoldBatches(false);
  if (current_.has_value()) HoldForCurrent();
}

void DeviceRegions::OnHoldExpired() {
  if (!current_.has_value()) return;
  std::string who;
  for (const StreamId stream : current_->awaited) {
    absl::StrAppend(&who, who.empty() ? "" : ", ", actions_->NameOf(stream));
  }
  const bool opening = current_->region != nullptr;
  absl::Status late = absl::DeadlineExceededError(absl::StrCat(
      opening ? "register" : "unregister", ": ",
      who.empty() ? "the batches in flight have not ended" : absl::StrCat(who, " did not answer"),
      " in time; retry, and see the workers' logs"));
  Operation ended = *std::exchange(current_, std::nullopt);
  const bool holding = ended.phase == Phase::kHolding;
  if (!opening || !holding) unclosed_.insert(ended.ids.begin(), ended.ids.end());
  // What workers were not told to close is closed whether anybody asks again or not: nobody is to
  // keep it. After those that wait, who else might wait for ever.
  if (opening != holding && !IsClosingAsked()) {
    Operation close;
    close.done = [](const absl::Status&) {};
    close.follows = true;
    waiting_.push_back(std::move(close));
  }
  End(std::move(ended), late);
}

bool DeviceRegions::HasAnyOpen(StreamId stream, const std::vector<std::uint64_t>& ids) const {
  const auto member = members_.find(stream);
  if (member == members_.end()) return false;
  return std::ranges::any_of(ids, [&](std::uint64_t id) { return member->second.contains(id); });
}

void DeviceRegions::OnAnswer(const DeviceRegionAnswer& answer) {
  const auto member = members_.find(answer.stream);
  if (member != members_.end()) {
    for (const std::uint64_t id : answer.closed) member->second.erase(id);
  }
  if (!current_.has_value() || !current_->awaited.contains(answer.stream)) return;
  if (answer.opened.has_value()) {
    if (current_->phase != Phase::kOpening || answer.opened->region != current_->ids.front()) {
      return;  // Of an opening that was given up.
    }
    if (!answer.opened->status.ok()) {
      current_->refusals.emplace(actions_->NameOf(answer.stream), answer.opened->status);
      if (member != members_.end()) member->second.erase(answer.opened->region);
    }
  } else if (current_->phase != Phase::kClosing || HasAnyOpen(answer.stream, current_->ids)) {
    return;  // Of a closing that was given up.
  }
  current_->awaited.erase(answer.stream);
  Advance();
}

std::vector<DeviceRegionInfo> DeviceRegions::JoinEpoch(EpochId epoch, StreamId stream) {
  if (epoch != epoch_) {
    epoch_ = epoch;
    members_.clear();
    unusable_.clear();
  }
  std::set<std::uint64_t>& open = members_[stream];
  open.clear();
  std::vector<DeviceRegionInfo> infos;
  for (const auto& [id, kept] : regions_) {
    const std::shared_ptr<const ShmRegion> region = kept.lock();
    if (region == nullptr) continue;  // Its closing waits for its turn.
    open.insert(id);
    infos.push_back(InfoOf(*region));
  }
  return infos;
}

void DeviceRegions::OnRefused(EpochId epoch, StreamId stream,
                              const std::vector<DeviceRegionState>& refused) {
  const auto member = members_.find(stream);
  if (epoch != epoch_ || member == members_.end()) return;
  for (const DeviceRegionState& state : refused) {
    const auto region = regions_.find(state.region);
    if (region == regions_.end()) continue;
    const std::shared_ptr<const ShmRegion> kept = region->second.lock();
    if (kept == nullptr) continue;
    member->second.erase(state.region);
    unusable_.emplace(state.region,
                      Refusal("infer", kept->label(), actions_->NameOf(stream), state.status));
  }
}

void DeviceRegions::SetServing(bool serving) {
  serving_ = serving;
  if (serving || !current_.has_value() || current_->phase != Phase::kOpening) return;
  current_->outcome.Update(absl::UnavailableError(
      "register: a worker was lost while the region was being opened; retry when the service is "
      "ready"));
}

void DeviceRegions::Leave(StreamId stream) {
  members_.erase(stream);
  if (!current_.has_value() || current_->awaited.erase(stream) == 0) return;
  if (current_->phase == Phase::kOpening) {
    current_->outcome.Update(absl::UnavailableError(absl::StrCat(
        "register: ", actions_->NameOf(stream),
        " was lost while the region was being opened; retry when the service is ready")));
  }
  Advance();
}

void DeviceRegions::Stop(const absl::Status& status) {
  std::deque<Operation> left = std::move(waiting_);
  waiting_.clear();
  if (current_.has_value()) left.push_front(*std::exchange(current_, std::nullopt));
  for (Operation& operation : left) {
    operation.region = nullptr;
    operation.done(status);
  }
}

absl::Status DeviceRegions::CheckUsable(const ValidatedRequest& request) const {
  if (unusable_.empty()) return absl::OkStatus();
  for (const RegionWindow* window :
       {&request.source, &request.output, &request.ids_source, &request.weights_source}) {
    if (window->region == nullptr) continue;
    const auto found = unusable_.find(window->region->info().id);
    if (found != unusable_.end()) return found->second;
  }
  return absl::OkStatus();
}

}  // namespace epserve::coordinator
