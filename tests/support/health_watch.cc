#include "tests/support/health_watch.h"

#include <chrono>
#include <utility>

namespace epserve::testing {
namespace {

// HealthCheckRequest { string service = 1; }
grpc::ByteBuffer Request(const std::string& service) {
  std::string bytes;
  if (!service.empty()) {
    bytes.push_back('\x0a');
    bytes.push_back(static_cast<char>(service.size()));
    bytes += service;
  }
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

// HealthCheckResponse { ServingStatus status = 1; }
int StatusOf(grpc::ByteBuffer& response) {
  grpc::Slice slice;
  if (!response.DumpToSingleSlice(&slice).ok() || slice.size() < 2) return 0;
  return slice.begin()[1];
}

}  // namespace

HealthWatch::HealthWatch(std::shared_ptr<grpc::Channel> channel, const std::string& service)
    : stub_(std::move(channel)), request_(Request(service)) {
  context_.set_wait_for_ready(true);
  call_ = stub_.PrepareCall(&context_, "/grpc.health.v1.Health/Watch", &queue_);
  reader_ = std::thread([this] { Read(); });
}

HealthWatch::~HealthWatch() {
  context_.TryCancel();
  reader_.join();
}

void HealthWatch::Read() {
  void* tag = nullptr;
  bool ok = false;
  const auto next = [&] { return queue_.Next(&tag, &ok) && ok; };
  call_->StartCall(&call_);
  bool going = next();
  if (going) {
    call_->WriteLast(request_, grpc::WriteOptions(), &call_);
    going = next();
  }
  while (going) {
    grpc::ByteBuffer response;
    call_->Read(&response, &call_);
    going = next();
    if (!going) break;
    std::lock_guard<std::mutex> lock(mu_);
    seen_.push_back(StatusOf(response) == 1);
    changed_.notify_all();
  }
  grpc::Status status;
  call_->Finish(&status, &call_);
  next();
  queue_.Shutdown();
  while (queue_.Next(&tag, &ok)) {
  }
}

bool HealthWatch::WaitFor(bool serving) {
  std::unique_lock<std::mutex> lock(mu_);
  return changed_.wait_for(lock, std::chrono::seconds(60),
                           [&] { return !seen_.empty() && seen_.back() == serving; });
}

std::vector<bool> HealthWatch::seen() const {
  std::lock_guard<std::mutex> lock(mu_);
  return seen_;
}

int CheckHealth(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", Request(service), &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, &call);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  return status.ok() ? StatusOf(response) : -1;
}

}  // namespace epserve::testing
