#include "server/microbench/echo_client.h"

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/base/status.h"
#include "server/microbench/echo_peer.h"

namespace epserve::microbench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kLongestWait = std::chrono::seconds(30);

grpc::ByteBuffer MessageOf(std::int64_t bytes) {
  const grpc::Slice slice(std::string(static_cast<std::size_t>(bytes), 'x'));
  return grpc::ByteBuffer(&slice, 1);
}

// Echoes one after another; the tag of all its operations.
class Line {
 public:
  virtual ~Line() = default;
  virtual void Start() = 0;  // the next echo
  // An operation has ended: true where the echo is back with it.
  virtual bool Proceed() = 0;
  virtual const grpc::ByteBuffer& reply() const = 0;
  // What is in flight comes back soon, with or without success.
  virtual void End() = 0;
};

class StreamLine final : public Line {
 public:
  StreamLine(grpc::GenericStub& stub, grpc::ByteBuffer message, grpc::CompletionQueue* queue)
      : message_(std::move(message)), stream_(stub.PrepareCall(&context_, kStreamMethod, queue)) {
    stream_->StartCall(this);
  }
  void Start() override {
    in_flight_ = 2;
    // In this order the last reply's window update rides on the message.
    stream_->Write(message_, this);
    stream_->Read(&reply_, this);
  }
  bool Proceed() override { return --in_flight_ == 0; }
  const grpc::ByteBuffer& reply() const override { return reply_; }
  void End() override {
    context_.TryCancel();
    stream_->Finish(&status_, this);
  }

 private:
  const grpc::ByteBuffer message_;
  grpc::ByteBuffer reply_;
  grpc::Status status_;
  grpc::ClientContext context_;
  const std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  int in_flight_ = 1;  // the opening
};

class UnaryLine final : public Line {
 public:
  UnaryLine(grpc::GenericStub& stub, grpc::ByteBuffer message, grpc::CompletionQueue* queue)
      : message_(std::move(message)), stub_(stub), queue_(queue) {}
  void Start() override {
    call_.reset();
    context_.emplace();
    call_ = stub_.PrepareUnaryCall(&*context_, kUnaryMethod, message_, queue_);
    call_->StartCall();
    call_->Finish(&reply_, &status_, this);
  }
  bool Proceed() override {
    if (!status_.ok()) reply_.Clear();
    return true;
  }
  const grpc::ByteBuffer& reply() const override { return reply_; }
  void End() override {
    if (context_.has_value()) context_->TryCancel();
  }

 private:
  const grpc::ByteBuffer message_;
  grpc::GenericStub& stub_;
  grpc::CompletionQueue* const queue_;
  grpc::ByteBuffer reply_;
  grpc::Status status_;
  std::optional<grpc::ClientContext> context_;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> call_;
};

// Several lines over one channel, and their queue.
class Echoes {
 public:
  Echoes(std::shared_ptr<grpc::Channel> channel, CallKind kind, std::int64_t bytes)
      : stub_(std::move(channel)), kind_(kind), message_(MessageOf(bytes)) {}
  ~Echoes() {
    for (const auto& line : lines_) line->End();
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  absl::Status Open(int num_lines) {
    for (int i = 0; i < num_lines; ++i) {
      if (kind_ == CallKind::kUnary) {
        lines_.push_back(std::make_unique<UnaryLine>(stub_, message_, &queue_));
        continue;
      }
      lines_.push_back(std::make_unique<StreamLine>(stub_, message_, &queue_));
      void* opened = nullptr;
      EPS_RETURN_IF_ERROR(NextEvent(queue_, "open a stream", &opened));
    }
    return absl::OkStatus();
  }

  Line& line(int index) { return *lines_[static_cast<std::size_t>(index)]; }

  // Waits until any line's echo is back.
  absl::StatusOr<Line*> Await() {
    for (;;) {
      void* tag = nullptr;
      EPS_RETURN_IF_ERROR(NextEvent(queue_, "echo", &tag));
      Line* const line = static_cast<Line*>(tag);
      if (!line->Proceed()) continue;
      if (line->reply().Length() == message_.Length()) return line;
      return absl::InternalError(absl::StrCat("rpc: an echo of ", message_.Length(),
                                              " bytes came back with ", line->reply().Length()));
    }
  }

 private:
  grpc::GenericStub stub_;
  const CallKind kind_;
  grpc::ByteBuffer message_;
  grpc::CompletionQueue queue_;
  std::vector<std::unique_ptr<Line>> lines_;
};

}  // namespace

double UsSince(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

absl::Status NextEvent(grpc::CompletionQueue& queue, const char* what, void** tag) {
  bool ok = false;
  const auto deadline = std::chrono::system_clock::now() + kLongestWait;
  if (queue.AsyncNext(tag, &ok, deadline) == grpc::CompletionQueue::GOT_EVENT && ok) {
    return absl::OkStatus();
  }
  return absl::UnavailableError(absl::StrCat("rpc: ", what,
                                             " failed: the peer is gone or has not answered for ",
                                             std::chrono::seconds(kLongestWait).count(), " s"));
}

absl::StatusOr<runtime::Percentiles> MeasureRoundTrips(const std::string& target, CallKind kind,
                                                       std::int64_t bytes, int warmup,
                                                       int iterations) {
  Echoes echoes(EchoChannel(target), kind, bytes);
  EPS_RETURN_IF_ERROR(echoes.Open(1));
  std::vector<double> samples_us;
  for (int i = -warmup; i < iterations; ++i) {
    const auto begin = Clock::now();
    echoes.line(0).Start();
    EPS_RETURN_IF_ERROR(echoes.Await().status());
    if (i >= 0) samples_us.push_back(UsSince(begin));
  }
  return runtime::PercentilesOf(std::move(samples_us));
}

namespace {

// `requests` echoes over the lines, each started where another has come back.
absl::Status Run(Echoes& echoes, int num_lines, int requests) {
  int started = 0;
  for (; started < num_lines && started < requests; ++started) echoes.line(started).Start();
  for (int returned = 0; returned < requests; ++returned) {
    EPS_ASSIGN_OR_RETURN(Line* const line, echoes.Await());
    if (started < requests) {
      ++started;
      line->Start();
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<double> MeasureThroughput(const std::string& target, CallKind kind, Callers callers,
                                         std::int64_t bytes, int concurrency, int requests) {
  const int num_threads = callers == Callers::kThreads ? concurrency : 1;
  const int lines_each = concurrency / num_threads;
  const std::shared_ptr<grpc::Channel> channel = EchoChannel(target);
  std::vector<std::unique_ptr<Echoes>> echoes;
  for (int i = 0; i < num_threads; ++i) {
    echoes.push_back(std::make_unique<Echoes>(channel, kind, bytes));
    EPS_RETURN_IF_ERROR(echoes.back()->Open(lines_each));
  }
  std::vector<absl::Status> results(echoes.size());
  const auto begin = Clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    const int share = requests / num_threads + (i < requests % num_threads ? 1 : 0);
    threads.emplace_back([&echoes, &results, i, share, lines_each] {
      const auto index = static_cast<std::size_t>(i);
      results[index] = Run(*echoes[index], lines_each, share);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double us = UsSince(begin);
  for (const absl::Status& result : results) EPS_RETURN_IF_ERROR(result);
  return requests / us * 1e6;
}

}  // namespace epserve::microbench
