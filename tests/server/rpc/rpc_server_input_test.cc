// What an RpcServer tells of having taken in all that had come for it.
#include <gmock/gmock.h>
#include <grpcpp/support/sync_stream.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "server/rpc/rpc_server.h"
#include "tests/server/rpc/rpc_fixture.h"

namespace epserve::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// A stream whose messages are kept, and counted, until all input is taken. All of the server's
// thread but where it says so.
class RpcServerInputTest : public RpcTest {
 protected:
  using Stream = grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;

  class Keeper final : public CallHandler {
   public:
    Keeper(ServerCall* call, RpcServerInputTest* test) : call_(call), test_(test) {
      call_->StartRead(&message_);
    }
    void OnReadDone(bool ok) override {
      if (!ok) return call_->Finish(grpc::Status::OK);
      ++test_->kept_;
      test_->wanted_ = test_->wants_;
      if (const auto on_next = test_->TakeOnNext()) on_next();
      call_->StartRead(&message_);
    }
    void OnDone() override { delete this; }

   private:
    ServerCall* const call_;
    RpcServerInputTest* const test_;
    grpc::ByteBuffer message_;
  };

  // Handlers look at the test until the server has stopped.
  ~RpcServerInputTest() override { server_.Stop(std::chrono::seconds(5)); }

  void Open() {
    server_.Handle(kMethod, [this](ServerCall* call) { return new Keeper(call, this); });
    server_.SetOnInputTaken(&wanted_, [this] {
      wanted_ = false;
      const std::lock_guard lock(mutex_);
      told_.push_back(kept_);
      is_told_.notify_all();
    });
    Start();
    stream_.reset(
        grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
            channel_.get(), method_, &context_));
  }
  // Returns once it has reached the server's socket.
  void Write() {
    const grpc::Slice slice("x");
    ASSERT_TRUE(
        stream_->Write(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions().set_write_through()));
  }
  // How many had been kept, at each time since the last call, once it has been told of `all`.
  std::vector<int> ToldUntil(int all) {
    std::unique_lock lock(mutex_);
    is_told_.wait(lock, [&] { return !told_.empty() && told_.back() == all; });
    return std::exchange(told_, {});
  }
  void SetOnNext(std::function<void()> on_next) {
    const std::lock_guard lock(mutex_);
    on_next_ = std::move(on_next);
  }
  std::function<void()> TakeOnNext() {
    const std::lock_guard lock(mutex_);
    return std::exchange(on_next_, nullptr);
  }
  void End() {
    stream_->WritesDone();
    EXPECT_TRUE(stream_->Finish().ok());
    server_.Stop(std::chrono::seconds(5));
  }

  static constexpr char kMethod[] = "/test.Input/Keep";
  const grpc::internal::RpcMethod method_{kMethod, grpc::internal::RpcMethod::BIDI_STREAMING};
  bool wants_ = true;
  std::atomic<bool> wanted_{false};
  int kept_ = 0;
  std::mutex mutex_;
  std::function<void()> on_next_;  // guarded by mutex_
  std::condition_variable is_told_;
  std::vector<int> told_;  // how many were kept then; guarded by mutex_
  grpc::ClientContext context_;
  std::unique_ptr<Stream> stream_;
};

TEST_F(RpcServerInputTest, IsToldBeforeTheThreadSleeps) {
  Open();
  Write();
  EXPECT_THAT(ToldUntil(1), ElementsAre(1));
  End();
}

// Where a thread of the client's, which is in this process, polls the sockets for the server's, a
// look may find nothing. Told before it looks, the server would never be told of three at once.
TEST_F(RpcServerInputTest, IsToldOnceForAllThatHadCome) {
  Open();
  int num_at_once = 0;
  for (int kept = 3; kept <= 60; kept += 3) {
    std::promise<void> first_is_read;
    std::promise<void> others_have_come;
    SetOnNext([&] {
      first_is_read.set_value();
      others_have_come.get_future().wait();
    });
    Write();
    first_is_read.get_future().wait();
    Write();
    Write();
    others_have_come.set_value();
    num_at_once += ToldUntil(kept).size() == 1 ? 1 : 0;
  }
  End();
  EXPECT_GT(num_at_once, 0);
}

TEST_F(RpcServerInputTest, IsNotToldWhereItIsNotWanted) {
  wants_ = false;
  Open();
  Write();
  End();
  EXPECT_EQ(kept_, 1);
  EXPECT_THAT(told_, IsEmpty());
}

}  // namespace
}  // namespace epserve::server
