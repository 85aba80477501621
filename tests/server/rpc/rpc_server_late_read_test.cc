// Reads of an RpcServer's calls that take effect with the next write.
#include <gmock/gmock.h>
#include <grpcpp/support/sync_stream.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "server/rpc/rpc_server.h"
#include "tests/server/rpc/rpc_fixture.h"

namespace epserve::server {
namespace {

using testing::ElementsAre;

// Answers each message but those that begin with "quiet", and reads on only after a write. Fails
// where a write's end is told within its start: a handler may hold a lock there.
class LateReader final : public CallHandler {
 public:
  LateReader(ServerCall* call, EventLog* log) : call_(call), log_(log) {
    call->StartRead(&message_);
  }

 private:
  void OnReadDone(bool ok) override {
    if (!ok) return call_->Finish(grpc::Status::OK);
    grpc::Slice bytes;
    ASSERT_TRUE(message_.DumpToSingleSlice(&bytes).ok());
    const std::string text(reinterpret_cast<const char*>(bytes.begin()), bytes.size());
    log_->Add(text);
    if (text.starts_with("quiet") || writing_) {
      owed_ += text.starts_with("quiet") ? "" : text;
    } else {
      Write(text);
    }
    call_->StartReadAfterWrite(&message_);
  }
  void OnWriteDone(bool ok) override {
    EXPECT_FALSE(starting_);
    writing_ = false;
    if (ok && !owed_.empty()) Write(std::exchange(owed_, ""));
  }
  void OnDone() override {
    log_->Add("done");
    delete this;
  }
  void Write(const std::string& text) {
    writing_ = true;
    const grpc::Slice slice(text);
    starting_ = true;
    call_->StartWrite(grpc::ByteBuffer(&slice, 1));
    starting_ = false;
  }

  ServerCall* const call_;
  EventLog* const log_;
  grpc::ByteBuffer message_;
  bool writing_ = false;
  bool starting_ = false;  // within StartWrite
  std::string owed_;
};

class LateReadTest : public RpcTest {
 protected:
  using Stream = grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;

  // Handlers write to log_ until the server has stopped.
  ~LateReadTest() override { server_.Stop(std::chrono::seconds(5)); }

  void Open() {
    server_.Handle(kMethod, [this](ServerCall* call) { return new LateReader(call, &log_); });
    Start();
    stream_.reset(
        grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
            channel_.get(), method_, &context_));
  }
  void Write(const std::string& text) {
    const grpc::Slice slice(text);
    ASSERT_TRUE(stream_->Write(grpc::ByteBuffer(&slice, 1)));
  }
  // What has come, until there are so many bytes of it.
  std::string ReadBytes(std::size_t count) {
    std::string all;
    grpc::ByteBuffer message;
    while (all.size() < count && stream_->Read(&message)) {
      grpc::Slice bytes;
      EXPECT_TRUE(message.DumpToSingleSlice(&bytes).ok());
      all.append(reinterpret_cast<const char*>(bytes.begin()), bytes.size());
    }
    return all;
  }

  static constexpr char kMethod[] = "/test.Late/Read";
  const grpc::internal::RpcMethod method_{kMethod, grpc::internal::RpcMethod::BIDI_STREAMING};
  EventLog log_;
  grpc::ClientContext context_;
  std::unique_ptr<Stream> stream_;
};

TEST_F(LateReadTest, MessagesAreReadOneAfterAnotherAndAllAtOnce) {
  Open();
  for (int i = 0; i < 20; ++i) {
    Write("x");
    ASSERT_EQ(ReadBytes(1), "x");
  }
  for (int i = 0; i < 100; ++i) Write("y");
  EXPECT_EQ(ReadBytes(100), std::string(100, 'y'));
  stream_->WritesDone();
  EXPECT_TRUE(stream_->Finish().ok());
}

TEST_F(LateReadTest, MessagesAreReadWhereNothingIsWritten) {
  Open();
  for (int i = 0; i < 3; ++i) Write("quiet");
  Write("x");
  EXPECT_EQ(ReadBytes(1), "x");
  stream_->WritesDone();
  EXPECT_TRUE(stream_->Finish().ok());
  EXPECT_THAT(log_.WaitFor("done"), ElementsAre("quiet", "quiet", "quiet", "x", "done"));
}

TEST_F(LateReadTest, CallThatIsCancelledWhileItsReadWaitsEnds) {
  Open();
  Write("quiet");
  EXPECT_THAT(log_.WaitFor("quiet"), ElementsAre("quiet"));
  context_.TryCancel();
  EXPECT_THAT(log_.WaitFor("done"), ElementsAre("quiet", "done"));
}

}  // namespace
}  // namespace epserve::server
