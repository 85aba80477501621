// A coordinator that a test scripts: a Control service over real gRPC whose streams wait for the
// test to read from them and write to them. It answers heartbeats of an epoch with a lease by
// itself, unless told not to. Thread-safe.
#ifndef EPSERVE_TESTS_SERVER_WORKER_FAKE_CONTROL_SERVICE_H_
#define EPSERVE_TESTS_SERVER_WORKER_FAKE_CONTROL_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include "epserve/v1/control.grpc.pb.h"

namespace epserve::worker {

// One worker's stream.
class ControlSession {
 public:
  using Stream = grpc::ServerReaderWriter<v1::CoordinatorMessage, v1::WorkerMessage>;

  ControlSession(grpc::ServerContext* context, Stream* stream)
      : context_(context), stream_(stream) {}

  // The next message that is neither a heartbeat nor progress; MESSAGE_NOT_SET where the stream
  // ended or sixty seconds passed.
  v1::WorkerMessage Next();
  void Send(const v1::CoordinatorMessage& message);
  // Ends the stream from this side, as if the coordinator had died.
  void Break();
  bool AwaitEnd();
  bool AwaitHeartbeats(int count);       // of this stream, in all
  int num_heartbeats() const;            // so far
  bool AwaitLease(std::uint64_t epoch);  // one in answer to a heartbeat of `epoch` was sent
  int progress_reports() const;

 private:
  friend class FakeControlService;

  grpc::ServerContext* const context_;
  Stream* const stream_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<v1::WorkerMessage> messages_;  // Guarded by mutex_, as all below.
  bool ended_ = false;
  int heartbeats_ = 0;
  std::uint64_t leased_epoch_ = 0;
  int progress_ = 0;
  std::mutex write_mutex_;  // One writer at a time.
};

class FakeControlService : public v1::Control::Service {
 public:
  static constexpr std::int64_t kLeaseUs = 1'000'000;

  FakeControlService() = default;
  ~FakeControlService() override;

  // `address` as gRPC takes it, "unix:/path".
  bool Start(const std::string& address);
  void Stop();
  // The next stream that a worker opens; null after sixty seconds.
  std::shared_ptr<ControlSession> NextSession();
  int num_sessions() const;

  void set_answer_heartbeats(bool answer) { answer_heartbeats_ = answer; }
  // Added to the epoch of every lease given.
  void set_lease_epoch_offset(std::int64_t offset) { lease_epoch_offset_ = offset; }

  grpc::Status Connect(grpc::ServerContext* context, ControlSession::Stream* stream) override;

 private:
  void Take(ControlSession& session, v1::WorkerMessage message);

  std::unique_ptr<grpc::Server> server_;
  std::atomic<bool> answer_heartbeats_ = true;
  std::atomic<std::int64_t> lease_epoch_offset_ = 0;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<ControlSession>> sessions_;  // Guarded by mutex_.
  int num_sessions_ = 0;
};

}  // namespace epserve::worker

#endif  // EPSERVE_TESTS_SERVER_WORKER_FAKE_CONTROL_SERVICE_H_
