// What RpcServer asks of callers by itself, whatever the handler is: messages no larger than the
// method's, and replies that are taken in time. The messages are those of the health protocol.
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <future>
#include <memory>
#include <string>

#include "grpc/health/v1/health.pb.h"
#include "server/rpc/message_stream.h"
#include "server/rpc/unary_call.h"
#include "tests/server/rpc/rpc_fixture.h"

namespace epserve::server {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using testing::HasSubstr;

constexpr char kUnary[] = "/test.Limits/Unary";
constexpr char kStream[] = "/test.Limits/Stream";
constexpr auto kPatience = std::chrono::seconds(60);  // Only a failing test waits that long.
constexpr auto kReplyTimeout = std::chrono::milliseconds(200);

grpc::ByteBuffer Bytes(std::size_t size) {
  const grpc::Slice slice(std::string(size, '\0'));
  return {&slice, 1};
}

// Of so many bytes: an unknown field of a string.
grpc::ByteBuffer Message(std::size_t size) {
  std::string text(size, 'x');
  text[0] = static_cast<char>(15 << 3 | 2);
  std::size_t left = size - 4;
  for (int i = 1; i < 4; ++i) {
    text[static_cast<std::size_t>(i)] = static_cast<char>((left & 0x7f) | (i < 3 ? 0x80 : 0));
    left >>= 7;
  }
  const grpc::Slice slice(text);
  return {&slice, 1};
}

// One call at a time, from the caller's side, step by step.
class Caller {
 public:
  Caller(const std::shared_ptr<grpc::Channel>& channel, const std::string& method)
      : stub_(channel) {
    context_.set_deadline(std::chrono::system_clock::now() + kPatience);
    call_ = stub_.PrepareCall(&context_, method, &queue_);
    call_->StartCall(this);
    EXPECT_TRUE(Next());
  }
  ~Caller() {
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) continue;
  }

  bool Write(const grpc::ByteBuffer& message) {
    call_->Write(message, this);
    return Next();
  }
  bool Read(grpc::ByteBuffer* message) {
    call_->Read(message, this);
    return Next();
  }
  grpc::Status Finish() {
    grpc::Status status;
    call_->Finish(&status, this);
    EXPECT_TRUE(Next());
    return status;
  }

 private:
  bool Next() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

class RpcServerLimitsTest : public RpcTest {
 protected:
  void HandleBoth(std::size_t max_message_bytes) {
    server_.Handle(
        kUnary, UnaryHandler<HealthCheckRequest, HealthCheckResponse>([this](const auto&, auto*) {
          ++answered_;
          return absl::OkStatus();
        }),
        RpcServer::Places::kCounted, max_message_bytes);
    server_.Handle(kStream,
                   EachAnswered<HealthCheckRequest, HealthCheckResponse>([this](const auto&) {
                     ++answered_;
                     return HealthCheckResponse();
                   }),
                   RpcServer::Places::kCounted, max_message_bytes);
  }

  std::atomic<int> answered_{0};
};

TEST_F(RpcServerLimitsTest, MessageTooLargeForItsMethodIsRefusedAndNeverHandled) {
  HandleBoth(/*max_message_bytes=*/20'000);
  Start();
  for (const char* method : {kUnary, kStream}) {
    answered_ = 0;
    grpc::ByteBuffer reply;
    Caller fitting(channel_, method);
    ASSERT_TRUE(fitting.Write(Message(20'000)));
    ASSERT_TRUE(fitting.Read(&reply)) << method;
    EXPECT_EQ(answered_, 1);

    Caller large(channel_, method);
    ASSERT_TRUE(large.Write(Message(20'001)));
    EXPECT_FALSE(large.Read(&reply)) << method;
    const grpc::Status status = large.Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_THAT(status.error_message(), HasSubstr(method));
    EXPECT_THAT(status.error_message(), HasSubstr("20001 bytes exceeds the 20000"));
    EXPECT_EQ(answered_, 1) << method;
  }
}

TEST_F(RpcServerLimitsTest, MethodTakesSmallMessagesUnlessItSaysMore) {
  server_.Handle(kUnary, UnaryHandler<HealthCheckRequest, HealthCheckResponse>(
                             [](const auto&, auto*) { return absl::OkStatus(); }));
  server_.Handle(kStream, EachAnswered<HealthCheckRequest, HealthCheckResponse>([](const auto&) {
                   return HealthCheckResponse();
                 }),
                 RpcServer::Places::kCounted, kAnyMessageBytes);
  Start();
  Caller small(channel_, kUnary);
  ASSERT_TRUE(small.Write(Message(kSmallMessageBytes + 1)));
  EXPECT_EQ(small.Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  Caller any(channel_, kStream);
  grpc::ByteBuffer reply;
  ASSERT_TRUE(any.Write(Message(kSmallMessageBytes + 1)));
  EXPECT_TRUE(any.Read(&reply));
}

// Answers with more than any window takes, as a stream's message or as the call's last, and tells
// when the call is done.
class LargeAnswer final : public CallHandler {
 public:
  LargeAnswer(ServerCall* call, bool last, std::promise<void>* done)
      : call_(call), last_(last), done_(*done) {
    call_->StartRead(&request_);
  }

 private:
  void OnReadDone(bool) override {
    const grpc::ByteBuffer answer = Bytes(std::size_t{64} << 20);
    if (last_) return call_->WriteAndFinish(answer);
    call_->StartWrite(answer);
  }
  void OnWriteDone(bool ok) override {
    EXPECT_FALSE(ok);
    call_->Finish(grpc::Status::OK);
  }
  void OnDone() override {
    done_.set_value();
    delete this;
  }

  ServerCall* const call_;
  const bool last_;
  std::promise<void>& done_;
  grpc::ByteBuffer request_;
};

TEST_F(RpcServerLimitsTest, ReplyThatIsNotTakenIsGivenUpAfterItsTime) {
  server_.SetCallLimits({.reply_timeout = kReplyTimeout});
  std::promise<void> done[2];
  server_.Handle(kUnary, [&](ServerCall* call) { return new LargeAnswer(call, true, &done[0]); });
  server_.Handle(kStream, [&](ServerCall* call) { return new LargeAnswer(call, false, &done[1]); });
  Start();
  for (const int i : {0, 1}) {
    SCOPED_TRACE(i);
    const auto start = std::chrono::steady_clock::now();
    Caller caller(channel_, i == 0 ? kUnary : kStream);
    ASSERT_TRUE(caller.Write(Message(10)));
    ASSERT_EQ(done[i].get_future().wait_for(kPatience / 2), std::future_status::ready);
    EXPECT_GE(std::chrono::steady_clock::now() - start, kReplyTimeout);
    grpc::ByteBuffer reply;
    EXPECT_FALSE(caller.Read(&reply));
    const grpc::Status status = caller.Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
    EXPECT_THAT(status.error_message(), HasSubstr("--reply-timeout-ms"));
  }
}

TEST_F(RpcServerLimitsTest, ReplyThatIsGivenUpEndsItsCallWithWhatIsSaidOfIt) {
  std::promise<void> done[2];
  std::promise<ServerCall*> calls[2];
  const auto handle = [&](int i) {
    return [&, i](ServerCall* call) {
      calls[i].set_value(call);
      return new LargeAnswer(call, /*last=*/i == 0, &done[i]);
    };
  };
  server_.Handle(kUnary, handle(0));
  server_.Handle(kStream, handle(1));
  Start();
  for (const int i : {0, 1}) {
    SCOPED_TRACE(i);
    Caller caller(channel_, i == 0 ? kUnary : kStream);
    ASSERT_TRUE(caller.Write(Message(10)));
    auto ended = done[i].get_future();
    ASSERT_EQ(ended.wait_for(kReplyTimeout), std::future_status::timeout);
    calls[i].get_future().get()->GiveUpReply(absl::ResourceExhaustedError("others need it"));
    ASSERT_EQ(ended.wait_for(kPatience / 2), std::future_status::ready);
    grpc::ByteBuffer reply;
    EXPECT_FALSE(caller.Read(&reply));
    const grpc::Status status = caller.Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(status.error_message(), "others need it");
  }
}

TEST_F(RpcServerLimitsTest, RepliesThatAreTakenInTimeMayTakeLongTogether) {
  // Longer than a busy machine keeps the server from taking the end of a write.
  constexpr auto kLongReplyTimeout = std::chrono::milliseconds(1500);
  server_.SetCallLimits({.reply_timeout = kLongReplyTimeout});
  server_.Handle(kStream, EachAnswered<HealthCheckRequest, HealthCheckResponse>(
                              [](const auto&) { return HealthCheckResponse(); }));
  Start();
  Caller caller(channel_, kStream);
  grpc::ByteBuffer reply;
  const auto end = std::chrono::steady_clock::now() + 2 * kLongReplyTimeout;
  while (std::chrono::steady_clock::now() < end) {
    ASSERT_TRUE(caller.Write(Message(10)));
    ASSERT_TRUE(caller.Read(&reply));
  }
}

}  // namespace
}  // namespace epserve::server
