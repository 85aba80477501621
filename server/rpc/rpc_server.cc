#include "server/rpc/rpc_server.h"

#include <grpc/grpc.h>
#include <grpcpp/alarm.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>

#include "server/common/busy_poll.h"
#include "server/common/grpc_status.h"
#include "server/common/immediate_event.h"
#include "server/common/late_read.h"
#include "server/rpc/connections.h"

namespace epserve::server {
namespace {

// Calls that a queue is ready to take at once; more wait inside gRPC for the next free place.
constexpr int kWaitingCallsPerLoop = 64;

// How often calls are looked at: bounds of what their limits ask for.
constexpr std::chrono::milliseconds kShortestTick{10};
constexpr std::chrono::milliseconds kLongestTick{1000};

// What a completion queue hands back.
struct Tag {
  virtual ~Tag() = default;
  virtual void Proceed(bool ok) = 0;
};

template <typename Owner, void (Owner::*kMethod)(bool)>
struct MemberTag final : Tag {
  explicit MemberTag(Owner* tag_owner) : owner(tag_owner) {}
  void Proceed(bool ok) override { (owner->*kMethod)(ok); }
  Owner* const owner;
};

}  // namespace

struct RpcServer::State {
  struct Listener {
    std::string address;
    const int* bound_by_grpc = nullptr;  // valid until the start is over
    int port = 0;                        // from then on
  };
  struct Method {
    MakeHandler make_handler;
    Places places = Places::kCounted;
    std::size_t max_message_bytes = kSmallMessageBytes;
  };
  std::unordered_map<std::string, Method> methods;
  CallLimits limits;
  std::chrono::microseconds busy_poll{0};
  std::atomic<bool> never_wanted{false};
  const std::atomic<bool>* input_taken_wanted = &never_wanted;
  std::function<void()> tell_input_taken;
  std::vector<Listener> listeners;
  Authorize authorize;  // null: everybody may call everything
  std::optional<BufferGuard::Limit> buffer_limit;
  std::unique_ptr<BufferGuard> buffer_guard;  // null: without that limit
  std::function<void(const std::string&)> on_no_place = [](const std::string&) {};
  grpc::AsyncGenericService service;
  std::vector<std::unique_ptr<Loop>> loops;
  std::unique_ptr<grpc::Server> server;

  std::mutex mutex;
  std::condition_variable all_done;
  bool stopping = false;  // Guarded by mutex, as below.
  int num_calls = 0;      // accepted and not yet done
  int num_taken = 0;      // of these, those that came before `stopping`
  std::size_t max_connections = SIZE_MAX;
  std::map<std::string, int> calls_of_peer;

  // Not OK: the server takes no more. The call's end must be told all the same.
  absl::Status CallBegins(bool* taken) {
    const std::lock_guard lock(mutex);
    ++num_calls;
    *taken = !stopping;
    num_taken += *taken ? 1 : 0;
    if (!stopping) return absl::OkStatus();
    return absl::UnavailableError("server: shutting down; retry against another, or later");
  }
  void CallEnds(bool taken) {
    const std::lock_guard lock(mutex);
    --num_calls;
    num_taken -= taken ? 1 : 0;
    if (num_taken == 0) all_done.notify_all();
  }
  // Not OK: there is no place for another connection. Otherwise LeavePlace is owed.
  absl::Status TakePlace(const std::string& peer) {
    const std::lock_guard lock(mutex);
    if (calls_of_peer.size() >= max_connections && !calls_of_peer.contains(peer)) {
      return absl::ResourceExhaustedError(
          "server: too many connections have calls under way; retry, or use fewer connections");
    }
    ++calls_of_peer[peer];
    return absl::OkStatus();
  }
  void LeavePlace(const std::string& peer) {
    const std::lock_guard lock(mutex);
    const auto of_peer = calls_of_peer.find(peer);
    if (--of_peer->second == 0) calls_of_peer.erase(of_peer);
  }
};

class RpcServer::Loop {
 public:
  Loop(State* state, std::unique_ptr<grpc::ServerCompletionQueue> queue)
      : state_(state), queue_(std::move(queue)) {}

  void Start();
  void ShutDown();
  void Join() { thread_.join(); }
  void AwaitCall();
  // Those that have a handler; of the loop's thread alone.
  std::list<Call*>& calls() { return calls_; }
  // Calls whose read waits, in the order of their due times. Of the loop's thread alone.
  std::list<Call*>::iterator Delay(Call* call) { return delayed_.insert(delayed_.end(), call); }
  void Forget(std::list<Call*>::iterator place) { delayed_.erase(place); }
  State* state() const { return state_; }
  grpc::ServerCompletionQueue* queue() const { return queue_.get(); }

 private:
  void Poll();
  void StartDueReads();
  void SetAlarm();
  void Tick(bool ok);

  State* const state_;
  const std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::list<Call*> calls_;
  std::list<Call*> delayed_;
  std::mutex mutex_;
  bool shut_down_ = false;  // Guarded by mutex_: nothing may be started on the queue.
  grpc::Alarm alarm_;
  MemberTag<Loop, &Loop::Tick> tick_{this};
  std::thread thread_;
};

// Lives until every operation that it has started has come back. One share is kept for Finish, so
// that a call which is cancelled with nothing in flight still waits for its handler.
class RpcServer::Call final : public ServerCall {
 public:
  explicit Call(Loop* loop) : loop_(loop), stream_(&context_) {
    context_.AsyncNotifyWhenDone(&ended_);
    loop->state()->service.RequestCall(&context_, &stream_, loop->queue(), loop->queue(),
                                       &accepted_);
  }

  void StartRead(grpc::ByteBuffer* message) override {
    Hold();
    reading_ = message;
    stream_.Read(message, &read_);
  }
  void StartReadAfterWrite(grpc::ByteBuffer* message) override {
    if (prompt_reads_ > 0) {
      --prompt_reads_;
      return StartRead(message);
    }
    Hold();
    reading_ = message;
    delayed_message_ = message;
    due_ = std::chrono::steady_clock::now() + kReadDelay;
    delayed_place_ = loop_->Delay(this);
  }
  void StartWrite(const grpc::ByteBuffer& message) override {
    Hold();
    writing_.store(true, std::memory_order_relaxed);
    stream_.Write(message, &written_);
  }
  void WriteAndFinish(const grpc::ByteBuffer& message) override {
    finishing_.store(true, std::memory_order_relaxed);
    stream_.WriteAndFinish(message, grpc::WriteOptions(), grpc::Status::OK, &finished_);
  }
  void Finish(const grpc::Status& status) override {
    finishing_.store(true, std::memory_order_relaxed);
    const std::size_t refused_bytes = refused_bytes_.load(std::memory_order_relaxed);
    if (refused_bytes == 0) return stream_.Finish(status, &finished_);
    stream_.Finish(
        ToGrpcStatus(MessageTooLarge(context_.method(), refused_bytes, max_message_bytes_)),
        &finished_);
  }
  void TryCancel() override { context_.TryCancel(); }
  void GiveUpReply(const absl::Status& status) override {
    grpc_call_cancel_with_status(context_.c_call(), static_cast<grpc_status_code>(status.code()),
                                 std::string(status.message()).c_str(), nullptr);
  }
  grpc::ServerContext& context() override { return context_; }
  std::uint64_t connection() const override { return connection_; }
  const CallLimits& limits() const override { return loop_->state()->limits; }
  void Tick(WaitClock::TimePoint now) {
    handler_->OnTick(now);
    const bool finishing = finishing_.load(std::memory_order_relaxed) && !has_finished_;
    if (!finishing && !writing_.load(std::memory_order_relaxed)) return;
    if (!replies_.Exceeds(limits().reply_timeout, now)) return;
    replies_.Reset();  // Once is enough; the next look is a whole timeout away.
    GiveUpReply(ReplyNotTaken(limits()));
  }

  std::chrono::steady_clock::time_point due() const { return due_; }
  // The read that was put off. REQUIRES: there is one.
  void StartDelayedRead() {
    loop_->Forget(delayed_place_);
    grpc::ByteBuffer* const message = std::exchange(delayed_message_, nullptr);
    const auto event = StartAndLook(loop_->queue(), [&] { stream_.Read(message, &read_); });
    if (!event.has_value()) return;
    if (event->tag == &read_ && event->ok) prompt_reads_ = kPromptReads;
    static_cast<Tag*>(event->tag)->Proceed(event->ok);
  }

 private:
  void Accepted(bool ok) {
    if (!ok) {  // The server is stopping; gRPC does not say that a call ended which never began.
      delete this;
      return;
    }
    Hold();  // for ended_
    peer_ = context_.peer();
    connection_ = std::hash<std::string>()(peer_);
    const absl::Status taken = loop_->state()->CallBegins(&taken_);
    loop_->AwaitCall();
    const auto& methods = loop_->state()->methods;
    const auto found = methods.find(context_.method());
    if (!taken.ok()) {
      Finish(ToGrpcStatus(taken));
    } else if (found == methods.end()) {
      Finish(grpc::Status(grpc::StatusCode::UNIMPLEMENTED,
                          "this server has no method " + context_.method()));
    } else if (const absl::Status admitted = Admit(found->second); !admitted.ok()) {
      Finish(ToGrpcStatus(admitted));
    } else {
      if (loop_->state()->buffer_guard) {
        buffered_.emplace(loop_->state()->buffer_guard.get(), peer_);
      }
      max_message_bytes_ = found->second.max_message_bytes;
      handler_ = found->second.make_handler(this);
      place_ = loop_->calls().insert(loop_->calls().end(), this);
    }
    Release();
  }
  // Who may not call takes no place from those who may.
  absl::Status Admit(const State::Method& method) {
    State* const state = loop_->state();
    if (state->authorize) {
      const absl::Status allowed = state->authorize(context_.method(), context_);
      if (!allowed.ok()) return allowed;
    }
    if (method.places == Places::kFree) return absl::OkStatus();
    const absl::Status has_place = state->TakePlace(peer_);
    counted_ = has_place.ok();
    if (!counted_) state->on_no_place(peer_);
    return has_place;
  }
  void Read(bool ok) {
    if (ok && buffered_) buffered_->OnMessage(reading_->Length());
    if (ok && max_message_bytes_ != kAnyMessageBytes && reading_->Length() > max_message_bytes_) {
      refused_bytes_.store(reading_->Length(), std::memory_order_relaxed);
      reading_->Clear();
      ok = false;
    }
    handler_->OnReadDone(ok);
    Release();
  }
  void Written(bool ok) {
    writing_.store(false, std::memory_order_relaxed);
    replies_.Reset();
    handler_->OnWriteDone(ok);
    if (delayed_message_ != nullptr) StartDelayedRead();
    Release();
  }
  void Ended(bool) {
    const bool finishing = finishing_.load(std::memory_order_relaxed);
    if (context_.IsCancelled() && !finishing && handler_ != nullptr) handler_->OnCancel();
    Release();
  }
  void Finished(bool) {
    has_finished_ = true;
    Release();
  }

  void Hold() { shares_.fetch_add(1, std::memory_order_relaxed); }
  void Release() {
    // acq_rel: what other threads did with the call comes before its end.
    if (shares_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    if (handler_ != nullptr) {
      loop_->calls().erase(place_);
      handler_->OnDone();
    }
    State* const state = loop_->state();
    const std::string peer = std::move(peer_);
    const bool taken = taken_;
    const bool counted = counted_;
    delete this;
    if (counted) state->LeavePlace(peer);
    state->CallEnds(taken);
  }

  Loop* const loop_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_;
  std::string peer_;  // set once accepted, as the next two
  std::uint64_t connection_ = 0;
  bool taken_ = false;
  bool counted_ = false;  // has a place among the connections
  std::size_t max_message_bytes_ = kSmallMessageBytes;
  std::optional<BufferGuard::Call> buffered_;
  grpc::ByteBuffer* reading_ = nullptr;  // what the read in flight fills
  CallHandler* handler_ = nullptr;       // null where there is none for it
  std::list<Call*>::iterator place_;     // among the loop's, where there is
  // Of the loop's thread alone.
  grpc::ByteBuffer* delayed_message_ = nullptr;  // null: no read is put off
  std::chrono::steady_clock::time_point due_;    // these two where one is
  std::list<Call*>::iterator delayed_place_;
  int prompt_reads_ = 0;
  WaitClock replies_;  // while writing_, or finishing_ and not has_finished_
  bool has_finished_ = false;
  std::atomic<std::size_t> refused_bytes_{0};  // of a message that was too large; 0: none was
  std::atomic<bool> writing_{false};
  std::atomic<bool> finishing_{false};
  std::atomic<int> shares_{2};  // for accepted_ and finished_
  MemberTag<Call, &Call::Accepted> accepted_{this};
  MemberTag<Call, &Call::Read> read_{this};
  MemberTag<Call, &Call::Written> written_{this};
  MemberTag<Call, &Call::Ended> ended_{this};
  MemberTag<Call, &Call::Finished> finished_{this};
};

void RpcServer::Loop::AwaitCall() { new Call(this); }

void RpcServer::Loop::Start() {
  for (int i = 0; i < kWaitingCallsPerLoop; ++i) AwaitCall();
  SetAlarm();
  thread_ = std::thread([this] { Poll(); });
}

void RpcServer::Loop::Poll() {
  void* tag = nullptr;
  bool ok = false;
  BusyPoll poll(state_->busy_poll);
  for (;;) {
    auto next = grpc::CompletionQueue::TIMEOUT;
    if (state_->input_taken_wanted->load(std::memory_order_relaxed)) {
      // With a deadline in the past it polls the sockets once, unless an operation that was started
      // here has asked the queue's poller to wake, which the first look then does and no more.
      for (int look = 0; look < 2 && next == grpc::CompletionQueue::TIMEOUT; ++look) {
        next = queue_->AsyncNext(&tag, &ok, gpr_time_0(GPR_CLOCK_REALTIME));
      }
      if (next == grpc::CompletionQueue::TIMEOUT) state_->tell_input_taken();
    }
    if (next == grpc::CompletionQueue::TIMEOUT) {
      auto deadline = kNoDeadline;
      if (!delayed_.empty()) {
        const auto wait = delayed_.front()->due() - std::chrono::steady_clock::now();
        deadline = std::chrono::system_clock::now() + wait;
      }
      next = poll.Next(queue_.get(), deadline, &tag, &ok);
    }
    if (next == grpc::CompletionQueue::SHUTDOWN) return;
    if (!delayed_.empty()) StartDueReads();
    if (next == grpc::CompletionQueue::GOT_EVENT) static_cast<Tag*>(tag)->Proceed(ok);
  }
}

void RpcServer::Loop::StartDueReads() {
  const auto now = std::chrono::steady_clock::now();
  while (!delayed_.empty() && delayed_.front()->due() <= now) {
    delayed_.front()->StartDelayedRead();
  }
}

void RpcServer::Loop::SetAlarm() {
  const CallLimits& limits = state_->limits;
  // A limit may be exceeded by a quarter, or by two seconds.
  const auto shortest =
      std::min({limits.message_timeout, limits.stream_idle_timeout, limits.reply_timeout});
  const auto period = std::clamp(shortest / 4, kShortestTick, kLongestTick);
  const std::lock_guard lock(mutex_);
  if (!shut_down_) alarm_.Set(queue_.get(), std::chrono::system_clock::now() + period, &tick_);
}

void RpcServer::Loop::Tick(bool ok) {
  if (!ok) return;  // The alarm was cancelled.
  const auto now = std::chrono::steady_clock::now();
  for (Call* const call : calls_) call->Tick(now);
  SetAlarm();
}

void RpcServer::Loop::ShutDown() {
  const std::lock_guard lock(mutex_);
  shut_down_ = true;
  alarm_.Cancel();
  queue_->Shutdown();
}

RpcServer::RpcServer() : state_(std::make_unique<State>()) {}

RpcServer::~RpcServer() { Stop(std::chrono::milliseconds(0)); }

void RpcServer::Handle(const std::string& method, MakeHandler make_handler, Places places,
                       std::size_t max_message_bytes) {
  state_->methods[method] = {std::move(make_handler), places, max_message_bytes};
}

void RpcServer::SetAuthorizer(Authorize authorize) { state_->authorize = std::move(authorize); }

void RpcServer::SetMaxConnections(std::size_t max_connections) {
  state_->max_connections = max_connections;
}

void RpcServer::SetBufferLimit(BufferGuard::Limit limit) {
  state_->buffer_limit = std::move(limit);
}

void RpcServer::SetOnNoPlace(std::function<void(const std::string&)> on_no_place) {
  state_->on_no_place = std::move(on_no_place);
}

void RpcServer::SetCallLimits(const CallLimits& limits) { state_->limits = limits; }

void RpcServer::SetOnInputTaken(const std::atomic<bool>* wanted, std::function<void()> tell) {
  state_->input_taken_wanted = wanted;
  state_->tell_input_taken = std::move(tell);
}

void RpcServer::SetBusyPoll(std::chrono::microseconds busy) { state_->busy_poll = busy; }

void RpcServer::Listen(const std::string& address,
                       std::shared_ptr<grpc::ServerCredentials> credentials,
                       grpc::ServerBuilder* builder, int* port) {
  builder->AddListeningPort(address, std::move(credentials), port);
  state_->listeners.push_back({address, port});
}

std::vector<std::string> RpcServer::services() const {
  std::set<std::string> names;
  for (const auto& [method, make] : state_->methods) {
    names.insert(method.substr(1, method.rfind('/') - 1));
  }
  return {names.begin(), names.end()};
}

bool RpcServer::Start(grpc::ServerBuilder* builder, int num_threads) {
  builder->RegisterAsyncGenericService(&state_->service);
  std::vector<std::unique_ptr<Loop>> loops;
  for (int i = 0; i < num_threads; ++i) {
    loops.push_back(std::make_unique<Loop>(state_.get(), builder->AddCompletionQueue()));
  }
  state_->server = builder->BuildAndStart();
  for (State::Listener& listener : state_->listeners) listener.port = *listener.bound_by_grpc;
  if (state_->server == nullptr) {
    for (const auto& loop : loops) loop->ShutDown();
    return false;
  }
  if (state_->buffer_limit) {
    std::vector<int> ports;
    for (const State::Listener& listener : state_->listeners) {
      if (!listener.address.starts_with("unix:")) ports.push_back(listener.port);
    }
    state_->buffer_guard =
        std::make_unique<BufferGuard>(std::move(ports), *std::move(state_->buffer_limit));
  }
  state_->loops = std::move(loops);
  for (const auto& loop : state_->loops) loop->Start();
  return true;
}

void RpcServer::Stop(std::chrono::milliseconds grace) {
  if (state_->server == nullptr) return;
  {
    std::unique_lock lock(state_->mutex);
    state_->stopping = true;
    state_->all_done.wait_for(lock, grace, [this] { return state_->num_taken == 0; });
  }
  for (const State::Listener& listener : state_->listeners) {
    EndConnections(listener.address, listener.port);
  }
  state_->server->Shutdown(std::chrono::system_clock::now());
  {
    // No operation may be started on a queue that is shut down, and a handler on another thread may
    // only just have learnt that its caller is gone.
    std::unique_lock lock(state_->mutex);
    state_->all_done.wait(lock, [this] { return state_->num_calls == 0; });
  }
  for (const auto& loop : state_->loops) loop->ShutDown();
  for (const auto& loop : state_->loops) loop->Join();
  state_->loops.clear();
  state_->buffer_guard.reset();
  state_->server.reset();
}

}  // namespace epserve::server
