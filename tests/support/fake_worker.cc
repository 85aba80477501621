#include "tests/support/fake_worker.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "server/common/probe.h"

namespace epserve::testing {
namespace {

constexpr auto kWaitLimit = std::chrono::seconds(60);  // Only a failing test waits that long.

template <typename T>
std::vector<T> Unpack(const std::string& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

// Ids and weights of a shard, by the fake's own router where it has none.
void Route(const v1::Shard& shard, std::vector<std::int32_t>* ids, std::vector<float>* weights) {
  if (shard.routed()) {
    *ids = Unpack<std::int32_t>(shard.topk_ids());
    *weights = Unpack<float>(shard.topk_weights());
    return;
  }
  for (std::int64_t t = 0; t < shard.num_tokens(); ++t) {
    for (int k = 0; k < shard.topk(); ++k) {
      ids->push_back(k);
      weights->push_back(1.0f / static_cast<float>(shard.topk()));
    }
  }
}

runtime::Placement PlacementOf(const v1::Assignment& assignment) {
  runtime::Placement placement;
  placement.first_expert.assign(assignment.first_expert().begin(), assignment.first_expert().end());
  return placement;
}

}  // namespace

std::vector<float> FakeOutput(const std::vector<float>& hidden,
                              const std::vector<std::int32_t>& topk_ids,
                              const std::vector<float>& topk_weights, std::int64_t num_tokens) {
  std::vector<float> output(hidden.size(), 0.0f);
  if (num_tokens == 0) return output;
  const std::size_t width = hidden.size() / static_cast<std::size_t>(num_tokens);
  const std::size_t topk = topk_ids.size() / static_cast<std::size_t>(num_tokens);
  for (std::size_t place = 0; place < topk_ids.size(); ++place) {
    if (topk_ids[place] < 0) continue;
    const std::size_t row = place / topk;
    const float factor = topk_weights[place] * static_cast<float>(topk_ids[place] + 1);
    for (std::size_t h = 0; h < width; ++h) {
      output[row * width + h] += factor * hidden[row * width + h];
    }
  }
  return output;
}

FakeWorker::FakeWorker(std::shared_ptr<grpc::Channel> channel, FakeWorkerOptions options)
    : options_(std::move(options)), stub_(v1::Control::NewStub(channel)) {
  context_.set_wait_for_ready(true);
  stream_ = stub_->Connect(&context_);
  v1::WorkerMessage message;
  *message.mutable_hello() = options_.hello;
  Send(message);
  reader_ = std::thread([this] { Read(); });
  if (options_.heartbeat_ms > 0) beater_ = std::thread([this] { Beat(); });
}

FakeWorker::~FakeWorker() {
  Kill();
  reader_.join();
  if (beater_.joinable()) beater_.join();
}

void FakeWorker::Send(const v1::WorkerMessage& message) {
  std::lock_guard<std::mutex> lock(write_mu_);
  stream_->Write(message);
}

void FakeWorker::Kill() { context_.TryCancel(); }

void FakeWorker::Read() {
  v1::CoordinatorMessage message;
  while (stream_->Read(&message)) {
    Handle(message);
    std::lock_guard<std::mutex> lock(mu_);
    received_.push_back(message);
    changed_.notify_all();
  }
  grpc::Status status = stream_->Finish();
  std::lock_guard<std::mutex> lock(mu_);
  status_ = std::move(status);
  closed_ = true;
  changed_.notify_all();
}

void FakeWorker::Beat() {
  std::unique_lock<std::mutex> lock(mu_);
  while (!closed_) {
    v1::WorkerMessage message;
    message.mutable_heartbeat()->set_epoch(epoch_);
    message.mutable_heartbeat()->set_sent_monotonic_us(1);
    lock.unlock();
    Send(message);
    lock.lock();
    changed_.wait_for(lock, std::chrono::milliseconds(options_.heartbeat_ms),
                      [this] { return closed_; });
  }
}

bool FakeWorker::WaitFor(v1::CoordinatorMessage::MessageCase kind, v1::CoordinatorMessage* out,
                         int skipped) {
  std::unique_lock<std::mutex> lock(mu_);
  const v1::CoordinatorMessage* found = nullptr;
  changed_.wait_for(lock, kWaitLimit, [&] {
    int others = skipped;
    for (const auto& message : received_) {
      if (message.message_case() == kind && others-- == 0) found = &message;
      if (found != nullptr) break;
    }
    return found != nullptr || closed_;
  });
  if (found != nullptr && out != nullptr) *out = *found;
  return found != nullptr;
}

bool FakeWorker::WaitClosed() {
  std::unique_lock<std::mutex> lock(mu_);
  return changed_.wait_for(lock, kWaitLimit, [this] { return closed_; });
}

grpc::Status FakeWorker::status() const {
  std::lock_guard<std::mutex> lock(mu_);
  return status_;
}

std::int64_t FakeWorker::NumReceived(v1::CoordinatorMessage::MessageCase kind,
                                     std::int64_t expected) {
  std::unique_lock<std::mutex> lock(mu_);
  std::int64_t count = 0;
  changed_.wait_for(lock, kWaitLimit, [&] {
    count = std::count_if(received_.begin(), received_.end(),
                          [kind](const auto& message) { return message.message_case() == kind; });
    return count >= expected || closed_;
  });
  return count;
}

void FakeWorker::Handle(const v1::CoordinatorMessage& message) {
  v1::WorkerMessage answer;
  switch (message.message_case()) {
    case v1::CoordinatorMessage::kAssignment:
      assignment_ = message.assignment();
      answer.mutable_loaded()->set_rank(assignment_.rank());
      answer.mutable_loaded()->set_num_ranks(assignment_.num_ranks());
      answer.mutable_loaded()->set_weight_bytes(1000);
      answer.mutable_loaded()->set_heap_bytes(2000);
      Send(answer);
      break;
    case v1::CoordinatorMessage::kCreateHeap: {
      answer.mutable_heap_created()->set_epoch(message.create_heap().epoch());
      answer.mutable_heap_created()->set_handle("heap-" + options_.hello.worker_id());
      for (const v1::DeviceRegion& region : message.create_heap().device_regions()) {
        const v1::DeviceRegionOpened opened = OpenRegion(region);
        if (opened.code() == 0) continue;
        *answer.mutable_heap_created()->add_refused_regions() = opened;
      }
      {
        std::lock_guard<std::mutex> lock(mu_);
        epoch_ = message.create_heap().epoch();
      }
      Send(answer);
      break;
    }
    case v1::CoordinatorMessage::kOpenPeers: {
      v1::PeersOpened* opened = answer.mutable_peers_opened();
      opened->set_epoch(message.open_peers().epoch());
      const runtime::Placement placement = PlacementOf(assignment_);
      const std::int64_t expert = server::ProbeExpert(placement, assignment_.rank());
      if (expert >= 0) {
        for (float x : server::ProbeRow(options_.hello.model().hidden())) {
          opened->add_probe_output(x * static_cast<float>(expert + 1));
        }
      }
      if (options_.on_probe_output) options_.on_probe_output(opened);
      Send(answer);
      break;
    }
    case v1::CoordinatorMessage::kOpenDeviceRegion:
      *answer.mutable_device_region_opened() = OpenRegion(message.open_device_region().region());
      Send(answer);
      break;
    case v1::CoordinatorMessage::kCloseDeviceRegions:
      *answer.mutable_device_regions_closed()->mutable_regions() =
          message.close_device_regions().regions();
      Send(answer);
      break;
    case v1::CoordinatorMessage::kShard:
      HandleShard(message.shard());
      break;
    case v1::CoordinatorMessage::kCountMatrix:
    case v1::CoordinatorMessage::kDispatchTrigger: {
      const std::uint64_t batch = message.has_count_matrix() ? message.count_matrix().batch()
                                                             : message.dispatch_trigger().batch();
      const auto it = waiting_.find(batch);
      if (it == waiting_.end()) break;
      if (it->second.trigger() == v1::TRIGGER_TOGETHER) {
        Finish(it->second);
      } else if (message.has_dispatch_trigger()) {
        answer.mutable_phase_done()->set_epoch(it->second.epoch());
        answer.mutable_phase_done()->set_batch(batch);
        answer.mutable_phase_done()->set_phase(v1::PHASE_DISPATCH);
        Send(answer);
      }
      break;
    }
    case v1::CoordinatorMessage::kCombineTrigger: {
      const auto it = waiting_.find(message.combine_trigger().batch());
      if (it != waiting_.end()) Finish(it->second);
      break;
    }
    case v1::CoordinatorMessage::kEpochEnded:
      waiting_.clear();
      if (!options_.quiesces) break;
      answer.mutable_epoch_quiesced()->set_epoch(message.epoch_ended().epoch());
      Send(answer);
      break;
    case v1::CoordinatorMessage::kShutdown:
      stream_->WritesDone();
      break;
    default:
      break;
  }
}

v1::DeviceRegionOpened FakeWorker::OpenRegion(const v1::DeviceRegion& region) const {
  v1::DeviceRegionOpened opened;
  opened.set_region(region.region());
  if (options_.on_device_region) options_.on_device_region(region, &opened);
  return opened;
}

void FakeWorker::HandleShard(const v1::Shard& shard) {
  waiting_[shard.batch()] = shard;
  // Its peers' counts it has no use for: that they are exchanged costs it nothing.
  const bool matrix_follows = !shard.has_counts() && !shard.device_counts();
  if (matrix_follows) {
    std::vector<std::int32_t> ids;
    std::vector<float> weights;
    Route(shard, &ids, &weights);
    const runtime::Placement placement = PlacementOf(assignment_);
    std::vector<std::int32_t> rows(static_cast<std::size_t>(placement.num_ranks()), 0);
    std::vector<std::int64_t> experts(static_cast<std::size_t>(placement.num_experts()), 0);
    runtime::CountShard(ids, shard.topk(), placement, rows, experts);
    v1::WorkerMessage answer;
    answer.mutable_counts()->set_epoch(shard.epoch());
    answer.mutable_counts()->set_batch(shard.batch());
    answer.mutable_counts()->mutable_rows_to_rank()->Assign(rows.begin(), rows.end());
    answer.mutable_counts()->mutable_rows_per_expert()->Assign(experts.begin(), experts.end());
    Send(answer);
  } else if (shard.trigger() == v1::TRIGGER_TOGETHER) {
    Finish(shard);
  }
}

void FakeWorker::Finish(const v1::Shard& shard_in_map) {
  const v1::Shard shard = shard_in_map;
  waiting_.erase(shard.batch());
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  Route(shard, &ids, &weights);
  const std::vector<float> output =
      FakeOutput(Unpack<float>(shard.hidden()), ids, weights, shard.num_tokens());
  v1::WorkerMessage answer;
  v1::BatchDone* done = answer.mutable_batch_done();
  done->set_epoch(shard.epoch());
  done->set_batch(shard.batch());
  done->mutable_output()->assign(reinterpret_cast<const char*>(output.data()),
                                 output.size() * sizeof(float));
  done->mutable_times()->set_ffn_ns(1000);
  const runtime::Placement placement = PlacementOf(assignment_);
  const std::int64_t num_local = placement.num_local_experts(assignment_.rank());
  for (std::int64_t i = 0; i < num_local; ++i) done->add_local_expert_rows(1);
  if (options_.on_shard && !options_.on_shard(shard, done)) return;
  Send(answer);
}

}  // namespace epserve::testing
