#include "server/worker/control_stream.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/log.h"
#include "server/common/grpc_status.h"
#include "server/common/late_read.h"
#include "server/worker/control_proto_convert.h"

namespace epserve::worker {
namespace {

// Bounds one attempt to connect, also where the coordinator's machine takes the connection and says
// nothing (a stopped process).
constexpr int kConnectTimeoutMs = 2000;

constexpr int kWindowBytes = 16 << 20;
constexpr int kFrameBytes = 1 << 20;
constexpr int kReadChunkBytes = 64 << 10;

enum Tag : std::intptr_t {
  kStarted = 1,
  kRead,
  kWritten,
  kHalfClosed,
  kAlarm,
  kHandedOver,
  kFinished
};

void* ToTag(Tag tag) { return reinterpret_cast<void*>(static_cast<std::intptr_t>(tag)); }

std::shared_ptr<grpc::Channel> MakeChannel(const ControlEndpoint& endpoint) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(-1);
  args.SetMaxSendMessageSize(-1);
  // Without a pool of its own a new channel would share the old one's connection and its back-off.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // The name notwithstanding, this one is the least time that an attempt to connect may take.
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectTimeoutMs);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 500);
  // With the default window of 64 KiB every shard is answered by a window update of its own, which
  // wakes the coordinator once per worker and batch; and larger shards wait for one on their way.
  args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
  args.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kFrameBytes);
  args.SetInt(GRPC_ARG_TCP_READ_CHUNK_SIZE, kReadChunkBytes);
  // The control stream never leaves the cluster.
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  if (!endpoint.tls_server_name.empty()) {
    args.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, endpoint.tls_server_name);
  }
  return grpc::CreateCustomChannel(endpoint.target, server::MakeChannelCredentials(endpoint.tls),
                                   args);
}

}  // namespace

ControlStream::ControlStream(const ControlEndpoint& endpoint, Hello hello, Handler* handler)
    : handler_(handler),
      stub_(v1::Control::NewStub(MakeChannel(endpoint))),
      busy_poll_(endpoint.busy_poll) {
  ShowSecret(endpoint);
  outgoing_.push_back(ToProto(std::move(hello)));
  stream_ = stub_->PrepareAsyncConnect(&context_, &queue_);
  stream_->StartCall(ToTag(kStarted));
  for (std::thread& thread : threads_) thread = std::thread([this] { Run(); });
}

// Read for every stream anew, so that a renewed secret needs no restart.
void ControlStream::ShowSecret(const ControlEndpoint& endpoint) {
  if (endpoint.secret_file.empty()) return;
  const absl::StatusOr<std::string> secret = server::ReadSecret(endpoint.secret_file);
  if (secret.ok()) {
    context_.AddMetadata("authorization", absl::StrCat("Bearer ", *secret));
  } else {  // The coordinator will refuse the call, and the next may find the file whole again.
    runtime::LogWarning("secret_not_read", {{"status", secret.status()}});
  }
}

ControlStream::~ControlStream() {
  Cancel();
  for (std::thread& thread : threads_) thread.join();
}

void ControlStream::Cancel() { context_.TryCancel(); }

void ControlStream::Send(WorkerMessage message) { SendProto(ToProto(std::move(message))); }

void ControlStream::SendProto(v1::WorkerMessage proto) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) return;
  if (writing_) {
    outgoing_.push_back(std::move(proto));
    return;
  }
  writing_ = true;
  const std::optional<bool> written = WriteLocked(proto);
  if (written.has_value()) ContinueWritingLocked(*written);
}

// Under the lock, because no operation may be started once the polling thread has shut the queue
// down.
std::optional<bool> ControlStream::WriteLocked(const v1::WorkerMessage& proto) {
  if (proto.has_batch_done() && owed_answers_ > 0) --owed_answers_;
  // Serialises here, so `proto` may go.
  const auto event = server::StartAndLook(&queue_, [&] { stream_->Write(proto, ToTag(kWritten)); });
  if (!event.has_value()) return std::nullopt;
  if (event->tag == ToTag(kWritten)) return event->ok;
  HandOverLocked(*event);
  return std::nullopt;
}

// Of the polling thread alone is what comes of any event but a write's end.
void ControlStream::HandOverLocked(const server::ImmediateEvent& event) {
  const bool is_alarm = event.tag == ToTag(kHandedOver);  // that says so of others, and is due anew
  if (!is_alarm) handed_over_.push_back(event);
  if (is_alarm || handed_over_.size() == 1) SetHandOverAlarmLocked();
}

// The queue is still open: it is shut down only by what comes of the call's last event. For a time
// that is past already the event is there at once; gRPC rounds any other up to its next
// millisecond.
void ControlStream::SetHandOverAlarmLocked() {
  hand_over_alarm_.Set(&queue_, std::chrono::system_clock::now() - std::chrono::seconds(1),
                       ToTag(kHandedOver));
}

// One at a time, with the alarm set for the next: this thread may be kept by the first.
bool ControlStream::OnHandedOver() {
  std::unique_lock<std::mutex> lock(mutex_);
  const server::ImmediateEvent event = handed_over_.front();
  handed_over_.pop_front();
  if (!handed_over_.empty()) SetHandOverAlarmLocked();
  lock.unlock();
  return OnEvent(event.tag, event.ok);
}

void ControlStream::HurryHeartbeat() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_ || hurry_) return;
  hurry_ = true;
  // A cancelled alarm fires at once, and so comes round on the polling thread.
  alarm_.Cancel();
}

void ControlStream::CloseAfterFlush(absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!closing_) {
    closing_ = true;
    if (!writing_) {
      writing_ = true;
      half_closed_ = true;
      stream_->WritesDone(ToTag(kHalfClosed));
    }
  }
  if (!ended_changed_.wait_for(lock, absl::ToChronoMilliseconds(timeout),
                               [this] { return num_running_ == 0; })) {
    lock.unlock();
    Cancel();
    lock.lock();
    ended_changed_.wait(lock, [this] { return num_running_ == 0; });
  }
}

void ControlStream::Run() {
  if (PollToTheEnd()) {
    absl::Status status = gave_up_.ok() ? server::FromGrpcStatus(final_status_) : gave_up_;
    if (status.ok()) {
      status = absl::UnavailableError("control stream: the coordinator ended it");
    }
    handler_->OnClosed(status);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (--num_running_ == 0) ended_changed_.notify_all();
}

// False: the other thread saw the end.
bool ControlStream::PollToTheEnd() {
  void* tag = nullptr;
  bool ok = false;
  while (turn_.Await()) {
    for (bool mine = true; mine;) {
      if (!NextEvent(&tag, &ok)) {
        turn_.End();
        return true;
      }
      mine = OnEvent(tag, ok);
    }
  }
  return false;
}

bool ControlStream::NextEvent(void** tag, bool* ok) {
  for (;;) {
    std::optional<std::chrono::steady_clock::time_point> due;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (read_delayed_) due = read_due_;
    }
    auto deadline = server::kNoDeadline;
    if (due.has_value()) {
      deadline = std::chrono::system_clock::now() + (*due - std::chrono::steady_clock::now());
    }
    const auto next = busy_poll_.Next(&queue_, deadline, tag, ok);
    if (next != grpc::CompletionQueue::TIMEOUT) return next == grpc::CompletionQueue::GOT_EVENT;
    std::lock_guard<std::mutex> lock(mutex_);
    if (read_delayed_ && read_due_ <= std::chrono::steady_clock::now()) StartDelayedReadLocked();
  }
}

bool ControlStream::OnEvent(void* tag, bool ok) {
  switch (static_cast<Tag>(reinterpret_cast<std::intptr_t>(tag))) {
    case kStarted:
      OnStarted(ok);
      return true;
    case kRead:
      return OnRead(ok);
    case kWritten:
      OnWritten(ok);
      return true;
    case kHalfClosed:
      return true;
    case kAlarm:
      OnAlarm(ok);
      return true;
    case kHandedOver:
      return OnHandedOver();
    case kFinished:
      OnFinished();
      return true;
  }
  return true;
}

void ControlStream::OnFinished() {
  std::lock_guard<std::mutex> lock(mutex_);
  closing_ = true;
  finished_ = true;
  alarm_.Cancel();
  queue_.Shutdown();  // Next returns false once every operation has come back.
}

void ControlStream::RequestFinish() {
  if (std::exchange(finish_requested_, true)) return;
  stream_->Finish(&final_status_, ToTag(kFinished));
}

void ControlStream::OnStarted(bool ok) {
  if (!ok) {
    RequestFinish();
    return;
  }
  stream_->Read(&incoming_, ToTag(kRead));
  OnWritten(true);  // The hello is queued; nothing was written before it.
  OnAlarm(true);
}

bool ControlStream::OnRead(bool ok) {
  if (!ok) {
    RequestFinish();
    return true;
  }
  // A batch may be carried out with its shard, or with its count matrix where that comes apart.
  const bool is_batch = incoming_.has_shard() || incoming_.has_count_matrix();
  absl::StatusOr<CoordinatorMessage> message = FromProto(incoming_);
  // Before the handler is told: the answer may go out before it returns.
  const bool read_on = !DelayRead(incoming_.message_case());
  if (is_batch && message.ok()) {
    // Before, too: the handler may keep this thread, and the next message is another's then.
    if (read_on) stream_->Read(&incoming_, ToTag(kRead));
    const std::uint64_t absence = turn_.Leave();
    handler_->OnMessage(*std::move(message));
    return turn_.Return(absence);
  }
  if (message.ok()) {
    handler_->OnMessage(*std::move(message));
  } else if (absl::IsUnimplemented(message.status())) {
    runtime::LogWarning("control_message_unknown", {{"error", message.status()}});
  } else {
    GiveUp(message.status());
  }
  if (read_on) stream_->Read(&incoming_, ToTag(kRead));
  return true;
}

// False: the next read may not wait for an answer to be written.
bool ControlStream::DelayRead(v1::CoordinatorMessage::MessageCase kind) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (kind == v1::CoordinatorMessage::kEpochEnded) owed_answers_ = 0;
  const bool is_shard = kind == v1::CoordinatorMessage::kShard;
  if (is_shard) ++owed_answers_;
  if (!is_shard && kind != v1::CoordinatorMessage::kCountMatrix) return false;
  if (owed_answers_ != 1) return false;
  if (prompt_reads_ > 0) {
    --prompt_reads_;
    return false;
  }
  read_delayed_ = true;
  read_due_ = std::chrono::steady_clock::now() + server::kReadDelay;
  return true;
}

void ControlStream::StartDelayedReadLocked() {
  read_delayed_ = false;
  const auto event =
      server::StartAndLook(&queue_, [&] { stream_->Read(&incoming_, ToTag(kRead)); });
  if (!event.has_value()) return;
  if (event->tag == ToTag(kRead)) prompt_reads_ = server::kPromptReads;
  HandOverLocked(*event);
}

void ControlStream::OnWritten(bool ok) {
  std::lock_guard<std::mutex> lock(mutex_);
  ContinueWritingLocked(ok);
}

void ControlStream::ContinueWritingLocked(bool ok) {
  // A write may come back well after the end of its call did; none may follow it then.
  if (finished_) return;
  // The window update has gone out with it.
  if (read_delayed_) StartDelayedReadLocked();
  while (ok && !outgoing_.empty()) {
    const v1::WorkerMessage next = std::move(outgoing_.front());
    outgoing_.pop_front();
    const std::optional<bool> written = WriteLocked(next);
    if (!written.has_value()) return;
    ok = *written;
  }
  if (!ok) {
    // The call is over; the pending read fails too and asks for the status.
    closing_ = true;
    outgoing_.clear();
    return;
  }
  if (closing_ && !half_closed_) {
    half_closed_ = true;
    stream_->WritesDone(ToTag(kHalfClosed));
    return;
  }
  writing_ = false;
}

void ControlStream::OnAlarm(bool ok) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const bool hurried = std::exchange(hurry_, false);
    if (closing_ || (!ok && !hurried)) return;
  }
  Tick tick = handler_->OnHeartbeatDue();
  if (!tick.status.ok()) {
    GiveUp(std::move(tick.status));
    return;
  }
  SendProto(ToProto(std::move(tick.heartbeat)));
  SetAlarm(tick.next);
}

void ControlStream::SetAlarm(absl::Duration delay) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closing_) return;
  const absl::Duration wait = hurry_ ? absl::ZeroDuration() : delay;
  alarm_.Set(&queue_, std::chrono::system_clock::now() + absl::ToChronoMicroseconds(wait),
             ToTag(kAlarm));
}

void ControlStream::GiveUp(absl::Status reason) {
  if (gave_up_.ok()) gave_up_ = std::move(reason);
  Cancel();
}

}  // namespace epserve::worker
