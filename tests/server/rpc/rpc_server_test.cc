// Calls over RpcServer: how they are answered, cancelled and ended, and how the server stops. The
// messages are those of the health protocol; any would do.
#include "server/rpc/rpc_server.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/rpc/message_stream.h"
#include "server/rpc/unary_call.h"
#include "tests/server/rpc/rpc_fixture.h"

namespace epserve::server {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using testing::AnyOf;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::StartsWith;

constexpr char kCheck[] = "/grpc.health.v1.Health/Check";
constexpr char kWatch[] = "/grpc.health.v1.Health/Watch";

class RpcServerTest : public RpcTest {
 protected:
  grpc::Status Check(const std::string& service, HealthCheckResponse* response) {
    grpc::ClientContext context;
    HealthCheckRequest request;
    request.set_service(service);
    return Health::NewStub(channel_)->Check(&context, request, response);
  }
};

TEST_F(RpcServerTest, UnaryCallIsAnsweredOrFails) {
  server_.Handle(kCheck, UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                             [](const auto& request, auto* response) -> absl::Status {
                               if (request.service() == "bad") return absl::DataLossError("lost");
                               response->set_status(HealthCheckResponse::SERVING);
                               return absl::OkStatus();
                             }));
  Start();
  HealthCheckResponse response;
  ASSERT_TRUE(Check("good", &response).ok());
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  const grpc::Status status = Check("bad", &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(status.error_message(), "lost");
}

TEST_F(RpcServerTest, MethodThatIsNotThereIsUnimplementedNamingIt) {
  Start();
  HealthCheckResponse response;
  const grpc::Status status = Check("", &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr(kCheck));
}

TEST_F(RpcServerTest, CallDroppedWithoutAnAnswerFailsInsteadOfHanging) {
  server_.Handle(kCheck, UnaryHandler([](UnaryCall, const grpc::ByteBuffer&) {}));
  Start();
  HealthCheckResponse response;
  EXPECT_EQ(Check("", &response).error_code(), grpc::StatusCode::INTERNAL);
}

TEST_F(RpcServerTest, BytesThatAreNoMessageGetAnErrorThatSaysSo) {
  server_.Handle(kCheck, UnaryHandler([](UnaryCall call, const grpc::ByteBuffer&) {
                   grpc::Slice slice("\xff\xff\xff");
                   const grpc::ByteBuffer nonsense(&slice, 1);
                   HealthCheckRequest request;
                   call.Fail(ParseMessage(nonsense, &request));
                 }));
  Start();
  HealthCheckResponse response;
  const grpc::Status status = Check("", &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("HealthCheckRequest"));
}

TEST_F(RpcServerTest, ManyCallsFromManyThreadsAreEachAnsweredOnce) {
  std::atomic<int> handled{0};
  server_.Handle(kCheck,
                 UnaryHandler<HealthCheckRequest, HealthCheckResponse>([&](const auto&, auto*) {
                   ++handled;
                   return absl::OkStatus();
                 }));
  Start(/*num_threads=*/2);
  constexpr int kCallers = 4, kCalls = 200;
  std::vector<std::thread> callers;
  std::atomic<int> answered{0};
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&] {
      for (int n = 0; n < kCalls; ++n) {
        HealthCheckResponse response;
        answered += Check("", &response).ok() ? 1 : 0;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(handled.load(), kCallers * kCalls);
  EXPECT_EQ(answered.load(), kCallers * kCalls);
}

// Keeps what it was told; finishes when it is told of a cancellation.
class Recorder final : public CallHandler {
 public:
  Recorder(ServerCall* call, EventLog* log) : call_(call), log_(log) { call->StartRead(&message_); }

 private:
  void OnReadDone(bool ok) override { log_->Add(ok ? "read" : "no read"); }
  void OnCancel() override {
    log_->Add("cancel");
    call_->Finish(grpc::Status::CANCELLED);
  }
  void OnDone() override {
    log_->Add("done");
    delete this;
  }

  ServerCall* const call_;
  EventLog* const log_;
  grpc::ByteBuffer message_;
};

TEST_F(RpcServerTest, HandlerLearnsThatItsCallerHasGoneAndIsDoneLast) {
  EventLog log;
  server_.Handle(kCheck, [&](ServerCall* call) { return new Recorder(call, &log); });
  Start();
  grpc::ClientContext context;
  std::thread caller([&] {
    HealthCheckResponse response;
    const grpc::Status status =
        Health::NewStub(channel_)->Check(&context, HealthCheckRequest(), &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
  });
  EXPECT_THAT(log.WaitFor("read"), ElementsAre("read"));
  context.TryCancel();
  caller.join();
  EXPECT_THAT(log.WaitFor("done"), ElementsAre("read", "cancel", "done"));
}

TEST_F(RpcServerTest, CallsOfOneConnectionTooManyAreRefusedUntilAnotherEnds) {
  EventLog log;
  server_.Handle(kCheck, [&](ServerCall* call) { return new Recorder(call, &log); });
  server_.SetMaxConnections(1);
  std::vector<std::string> turned_away;  // of the server's thread until it has stopped
  server_.SetOnNoPlace([&](const std::string& peer) { turned_away.push_back(peer); });
  Start();
  grpc::ClientContext context;
  std::thread caller([&] {
    HealthCheckResponse response;
    (void)Health::NewStub(channel_)->Check(&context, HealthCheckRequest(), &response);
  });
  EXPECT_THAT(log.WaitFor("read"), ElementsAre("read"));
  grpc::ChannelArguments own_connection;
  own_connection.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto other =
      grpc::CreateCustomChannel(target_, grpc::InsecureChannelCredentials(), own_connection);
  const auto check = [&](std::chrono::milliseconds timeout) {
    grpc::ClientContext other_context;
    other_context.set_deadline(std::chrono::system_clock::now() + timeout);
    HealthCheckResponse response;
    return Health::NewStub(other)->Check(&other_context, HealthCheckRequest(), &response);
  };
  const grpc::Status refused = check(std::chrono::seconds(20));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.error_message(), HasSubstr("too many connections"));
  context.TryCancel();
  caller.join();
  log.WaitFor("done");
  // The connection is forgotten a moment after its last call's handler. Then a call of another has
  // a handler, which does not answer it; on a busy machine its time may be over before.
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (log.Count("read") < 2 && std::chrono::steady_clock::now() < give_up) {
    EXPECT_THAT(check(std::chrono::milliseconds(200)).error_code(),
                AnyOf(grpc::StatusCode::RESOURCE_EXHAUSTED, grpc::StatusCode::DEADLINE_EXCEEDED));
  }
  EXPECT_GE(log.Count("read"), 2);
  server_.Stop(std::chrono::milliseconds(0));
  ASSERT_THAT(turned_away, Not(IsEmpty()));
  EXPECT_THAT(turned_away, Each(StartsWith("ipv4:127.0.0.1:")));
}

TEST_F(RpcServerTest, CallsThatAreRefusedOrOfAFreeMethodTakeNoPlace) {
  EventLog log;
  const auto record = [&](ServerCall* call) { return new Recorder(call, &log); };
  server_.Handle(kWatch, record, RpcServer::Places::kFree);
  server_.Handle(kCheck, UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                             [](const auto&, auto*) { return absl::OkStatus(); }));
  server_.SetAuthorizer([](const std::string& method, grpc::ServerContext& context) {
    return method == kWatch || context.client_metadata().contains("known")
               ? absl::OkStatus()
               : absl::UnauthenticatedError("who?");
  });
  server_.SetMaxConnections(0);  // There is no place at all.
  Start();
  grpc::ClientContext watching;
  const auto watch = Health::NewStub(channel_)->Watch(&watching, HealthCheckRequest());
  EXPECT_THAT(log.WaitFor("read"), ElementsAre("read")) << "a free method's call has its handler";
  const auto check = [&](bool known) {
    grpc::ClientContext context;
    if (known) context.AddMetadata("known", "yes");
    HealthCheckResponse response;
    return Health::NewStub(channel_)->Check(&context, HealthCheckRequest(), &response);
  };
  EXPECT_EQ(check(false).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(check(true).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  watching.TryCancel();
  log.WaitFor("done");
}

TEST_F(RpcServerTest, StopCancelsWhatIsLeftAndWaitsForItsHandler) {
  EventLog log;
  server_.Handle(kCheck, [&](ServerCall* call) { return new Recorder(call, &log); });
  Start();
  std::thread caller([&] {
    HealthCheckResponse response;
    EXPECT_FALSE(Check("", &response).ok());
  });
  EXPECT_THAT(log.WaitFor("read"), ElementsAre("read"));
  server_.Stop(std::chrono::milliseconds(10));
  EXPECT_THAT(log.events, ElementsAre("read", "cancel", "done"));
  caller.join();
}

TEST_F(RpcServerTest, CallsThatComeWhileItStopsAreUnavailableAndNeverCancelled) {
  EventLog log;
  server_.Handle(kWatch, [&](ServerCall* call) { return new Recorder(call, &log); });
  server_.Handle(kCheck, UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                             [](const auto&, auto*) { return absl::OkStatus(); }));
  Start();
  // Keeps the server waiting for its grace, so that there is a while in which it stops.
  std::thread holder([&] {
    grpc::ClientContext context;
    HealthCheckResponse response;
    const auto held = Health::NewStub(channel_)->Watch(&context, HealthCheckRequest());
    EXPECT_FALSE(held->Read(&response));
    EXPECT_EQ(held->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  });
  log.WaitFor("read");
  std::mutex mutex;
  std::map<grpc::StatusCode, int> seen;  // Guarded by mutex.
  std::atomic<bool> stopped{false};
  std::atomic<int> calls{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      while (!stopped) {
        HealthCheckResponse response;
        const grpc::StatusCode code = Check("", &response).error_code();
        ++calls;
        const std::lock_guard lock(mutex);
        ++seen[code];
      }
    });
  }
  while (calls < 100) std::this_thread::yield();
  // Long enough for one of the callers to have a turn on a busy machine.
  server_.Stop(std::chrono::milliseconds(1500));
  stopped = true;
  for (std::thread& caller : callers) caller.join();
  holder.join();
  EXPECT_GT(seen[grpc::StatusCode::OK], 0);
  EXPECT_GT(seen[grpc::StatusCode::UNAVAILABLE], 0);
  EXPECT_EQ(seen.size(), 2u) << "other codes than OK and UNAVAILABLE";
}

TEST_F(RpcServerTest, StreamThatAnswersEachMessageEndsWithItsCaller) {
  server_.Handle(
      kWatch,
      EachAnswered<HealthCheckRequest, HealthCheckResponse>([](const HealthCheckRequest& request) {
        HealthCheckResponse response;
        response.set_status(request.service() == "a" ? HealthCheckResponse::SERVING
                                                     : HealthCheckResponse::NOT_SERVING);
        return response;
      }));
  Start();
  grpc::ClientContext context;
  const auto stream = std::unique_ptr<
      grpc::ClientReaderWriter<HealthCheckRequest, HealthCheckResponse>>(
      grpc::internal::ClientReaderWriterFactory<HealthCheckRequest, HealthCheckResponse>::Create(
          channel_.get(),
          grpc::internal::RpcMethod(kWatch, grpc::internal::RpcMethod::BIDI_STREAMING, channel_),
          &context));
  for (const char* service : {"a", "b", "a"}) {
    HealthCheckRequest request;
    request.set_service(service);
    ASSERT_TRUE(stream->Write(request));
    HealthCheckResponse response;
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_EQ(response.status() == HealthCheckResponse::SERVING, service[0] == 'a');
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

// Ended by the server after so long; nothing is sent on it.
grpc::Status StatusOfSilentStream(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  using Factory =
      grpc::internal::ClientReaderWriterFactory<HealthCheckRequest, HealthCheckResponse>;
  const std::unique_ptr<grpc::ClientReaderWriter<HealthCheckRequest, HealthCheckResponse>> stream(
      Factory::Create(
          channel.get(),
          grpc::internal::RpcMethod(kWatch, grpc::internal::RpcMethod::BIDI_STREAMING, channel),
          &context));
  return stream->Finish();
}

TEST_F(RpcServerTest, CallWhoseMessageDoesNotComeIsEndedAfterItsTime) {
  server_.SetCallLimits({.message_timeout = std::chrono::milliseconds(100)});
  server_.Handle(kWatch, UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                             [](const auto&, auto*) { return absl::OkStatus(); }));
  Start();
  const auto start = std::chrono::steady_clock::now();
  const grpc::Status status = StatusOfSilentStream(channel_);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(status.error_message(), HasSubstr("--message-timeout-ms"));
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(100));
}

TEST_F(RpcServerTest, UnaryCallWithoutAMessageIsToldSo) {
  server_.Handle(kWatch, UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                             [](const auto&, auto*) { return absl::OkStatus(); }));
  Start();
  grpc::ClientContext context;
  using Factory =
      grpc::internal::ClientReaderWriterFactory<HealthCheckRequest, HealthCheckResponse>;
  const std::unique_ptr<grpc::ClientReaderWriter<HealthCheckRequest, HealthCheckResponse>> call(
      Factory::Create(
          channel_.get(),
          grpc::internal::RpcMethod(kWatch, grpc::internal::RpcMethod::BIDI_STREAMING, channel_),
          &context));
  ASSERT_TRUE(call->WritesDone());
  const grpc::Status status = call->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("no message"));
}

TEST_F(RpcServerTest, StreamThatBringsNothingIsEndedAfterItsTime) {
  server_.SetCallLimits({.stream_idle_timeout = std::chrono::milliseconds(100)});
  server_.Handle(kWatch, EachAnswered<HealthCheckRequest, HealthCheckResponse>(
                             [](const HealthCheckRequest&) { return HealthCheckResponse(); }));
  Start();
  const grpc::Status status = StatusOfSilentStream(channel_);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("--stream-idle-timeout-ms"));
}

TEST_F(RpcServerTest, ServicesAreListedOnceEach) {
  server_.Handle("/a.B/One", EachAnswered<HealthCheckRequest, HealthCheckResponse>(
                                 [](const HealthCheckRequest&) { return HealthCheckResponse(); }));
  server_.Handle("/a.B/Two", UnaryHandler([](UnaryCall, const grpc::ByteBuffer&) {}));
  server_.Handle("/a.C/One", UnaryHandler([](UnaryCall, const grpc::ByteBuffer&) {}));
  EXPECT_THAT(server_.services(), ElementsAre("a.B", "a.C"));
}

}  // namespace
}  // namespace epserve::server
