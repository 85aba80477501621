#include "server/rpc/health_service.h"

#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "grpc/health/v1/health.pb.h"
#include "server/rpc/messages.h"
#include "server/rpc/unary_call.h"

namespace epserve::server {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ServingStatus = HealthCheckResponse::ServingStatus;

// Anybody may watch, for as long as they like, and takes no place among the connections.
constexpr std::size_t kMaxWatches = 1024;

}  // namespace

struct Health::State {
  std::mutex mutex;
  bool shut_down = false;                    // Guarded by mutex, as all below.
  std::map<std::string, bool> serving;       // by service
  std::set<std::shared_ptr<Watch>> watches;  // those whose request has come

  ServingStatus StatusOf(const std::string& service) const {
    const auto found = serving.find(service);
    if (found == serving.end()) return HealthCheckResponse::SERVICE_UNKNOWN;
    return found->second && !shut_down ? HealthCheckResponse::SERVING
                                       : HealthCheckResponse::NOT_SERVING;
  }
};

// One Watch call. Of the states that come while a write is in flight only the last is sent.
class Health::Watch final : public CallHandler, public std::enable_shared_from_this<Watch> {
 public:
  Watch(ServerCall* call, std::shared_ptr<State> state) : call_(call), state_(std::move(state)) {}

  void Begin() {
    self_ = shared_from_this();
    call_->StartRead(&incoming_);
  }

  const std::string& service() const { return service_; }  // set before it is among the watches

  void Tell(ServingStatus status) {
    const std::lock_guard lock(mutex_);
    wanted_ = status;
    WriteIfDue();
  }

 private:
  void OnReadDone(bool ok) override {
    read_ = true;
    HealthCheckRequest request;
    const absl::Status status = ok ? ParseMessage(incoming_, &request)
                                   : absl::CancelledError("health watch: no request came");
    if (!status.ok()) return End(status);
    service_ = request.service();
    const std::lock_guard lock(state_->mutex);
    if (state_->watches.size() >= kMaxWatches) {
      return End(absl::ResourceExhaustedError(absl::StrCat("health watch: there are ", kMaxWatches,
                                                           " already; end some, or use Check")));
    }
    state_->watches.insert(self_);
    Tell(state_->StatusOf(service_));
  }
  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    if (ok) WriteIfDue();
    if (ended_.has_value() && !writing_) call_->Finish(ToGrpcStatus(*ended_));
  }
  void OnCancel() override { End(absl::CancelledError("health watch: the caller has gone")); }
  void OnTick(WaitClock::TimePoint now) override {
    if (!read_ && waits_.Exceeds(call_->limits().message_timeout, now)) {
      End(MessageOverdue(call_->limits()));
    }
  }
  void OnDone() override {
    {
      const std::lock_guard lock(state_->mutex);
      state_->watches.erase(self_);
    }
    const std::shared_ptr<Watch> last = std::move(self_);
  }

  // REQUIRES: mutex_ held.
  void WriteIfDue() {
    if (writing_ || ended_.has_value() || wanted_ == told_) return;
    HealthCheckResponse response;
    response.set_status(*wanted_);
    grpc::ByteBuffer bytes;
    if (!SerializeMessage(response, &bytes).ok()) return;
    told_ = wanted_;
    writing_ = true;
    call_->StartWrite(bytes);
  }
  void End(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    if (ended_.has_value()) return;
    ended_ = status;
    if (!writing_) call_->Finish(ToGrpcStatus(status));
  }

  ServerCall* const call_;
  const std::shared_ptr<State> state_;
  std::shared_ptr<Watch> self_;  // until OnDone
  grpc::ByteBuffer incoming_;
  std::string service_;
  WaitClock waits_;  // this and the next of the call's queue alone
  bool read_ = false;

  std::mutex mutex_;  // Taken after the state's.
  std::optional<ServingStatus> wanted_;
  std::optional<ServingStatus> told_;
  std::optional<absl::Status> ended_;
  bool writing_ = false;
};

Health::Health() : state_(std::make_shared<State>()) {}

Health::~Health() = default;

void Health::AddTo(RpcServer* server) {
  server->Handle("/grpc.health.v1.Health/Check",
                 UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                     [state = state_](const auto& request, auto* response) {
                       const std::lock_guard lock(state->mutex);
                       const ServingStatus status = state->StatusOf(request.service());
                       if (status == HealthCheckResponse::SERVICE_UNKNOWN) {
                         return absl::NotFoundError(
                             absl::StrCat("health check: service \"", request.service(),
                                          "\" is not known; see the README for those that are"));
                       }
                       response->set_status(status);
                       return absl::OkStatus();
                     }),
                 RpcServer::Places::kFree);
  server->Handle(
      "/grpc.health.v1.Health/Watch",
      [state = state_](ServerCall* call) -> CallHandler* {
        auto watch = std::make_shared<Watch>(call, state);
        watch->Begin();
        return watch.get();
      },
      RpcServer::Places::kFree);
}

void Health::Set(const std::string& service, bool serving) {
  const std::lock_guard lock(state_->mutex);
  state_->serving[service] = serving;
  for (const auto& watch : state_->watches) {
    if (watch->service() == service) watch->Tell(state_->StatusOf(service));
  }
}

void Health::ShutDown() {
  const std::lock_guard lock(state_->mutex);
  state_->shut_down = true;
  for (const auto& watch : state_->watches) watch->Tell(state_->StatusOf(watch->service()));
}

}  // namespace epserve::server
