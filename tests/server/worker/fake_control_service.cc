#include "tests/server/worker/fake_control_service.h"

#include <chrono>
#include <utility>

namespace epserve::worker {
namespace {

constexpr std::chrono::seconds kPatience{60};  // Only a failing test waits that long.

}  // namespace

v1::WorkerMessage ControlSession::Next() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, kPatience, [this] { return !messages_.empty() || ended_; });
  if (messages_.empty()) return {};
  v1::WorkerMessage message = std::move(messages_.front());
  messages_.pop_front();
  return message;
}

void ControlSession::Send(const v1::CoordinatorMessage& message) {
  std::lock_guard<std::mutex> write_lock(write_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ended_) return;
  }
  stream_->Write(message);
}

void ControlSession::Break() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!ended_) context_->TryCancel();
}

bool ControlSession::AwaitEnd() {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, kPatience, [this] { return ended_; });
}

int ControlSession::num_heartbeats() const {
  const std::lock_guard lock(mutex_);
  return heartbeats_;
}

bool ControlSession::AwaitHeartbeats(int count) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, kPatience, [&] { return heartbeats_ >= count; });
}

bool ControlSession::AwaitLease(std::uint64_t epoch) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, kPatience, [&] { return leased_epoch_ >= epoch; });
}

int ControlSession::progress_reports() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return progress_;
}

FakeControlService::~FakeControlService() { Stop(); }

bool FakeControlService::Start(const std::string& address) {
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials());
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  return server_ != nullptr;
}

void FakeControlService::Stop() {
  if (!server_) return;
  server_->Shutdown(std::chrono::system_clock::now());  // Cancels the streams.
  server_->Wait();
  server_.reset();
}

std::shared_ptr<ControlSession> FakeControlService::NextSession() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, kPatience, [this] { return !sessions_.empty(); });
  if (sessions_.empty()) return nullptr;
  std::shared_ptr<ControlSession> session = std::move(sessions_.front());
  sessions_.pop_front();
  return session;
}

int FakeControlService::num_sessions() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_sessions_;
}

void FakeControlService::Take(ControlSession& session, v1::WorkerMessage message) {
  if (message.has_heartbeat()) {
    const v1::Heartbeat& heartbeat = message.heartbeat();
    const bool answer = answer_heartbeats_ && heartbeat.epoch() != 0;
    if (answer) {
      v1::CoordinatorMessage reply;
      reply.mutable_lease()->set_epoch(heartbeat.epoch() + lease_epoch_offset_);
      reply.mutable_lease()->set_echo_monotonic_us(heartbeat.sent_monotonic_us());
      reply.mutable_lease()->set_duration_us(kLeaseUs);
      session.Send(reply);
    }
    std::lock_guard<std::mutex> lock(session.mutex_);
    ++session.heartbeats_;
    if (answer) session.leased_epoch_ = heartbeat.epoch();
    session.changed_.notify_all();
    return;
  }
  std::lock_guard<std::mutex> lock(session.mutex_);
  if (message.has_load_progress()) {
    ++session.progress_;
  } else {
    session.messages_.push_back(std::move(message));
  }
  session.changed_.notify_all();
}

grpc::Status FakeControlService::Connect(grpc::ServerContext* context,
                                         ControlSession::Stream* stream) {
  auto session = std::make_shared<ControlSession>(context, stream);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    sessions_.push_back(session);
    ++num_sessions_;
    changed_.notify_all();
  }
  v1::WorkerMessage message;
  while (stream->Read(&message)) Take(*session, std::move(message));
  // Nobody writes to the stream once this has returned.
  std::lock_guard<std::mutex> write_lock(session->write_mutex_);
  std::lock_guard<std::mutex> lock(session->mutex_);
  session->ended_ = true;
  session->changed_.notify_all();
  return grpc::Status::OK;
}

}  // namespace epserve::worker
