// A worker in a test's own process: speaks Control over real gRPC and computes by a function that
// needs no weights, so that a test can script every fault. Expert e gives (e + 1) * x; a batch
// without ids is routed to experts 0..K-1 with weights 1/K.
//
// Thread safety: every public method may be called from any thread. Hooks run on the reader's
// thread.
#ifndef EPSERVE_TESTS_SUPPORT_FAKE_WORKER_H_
#define EPSERVE_TESTS_SUPPORT_FAKE_WORKER_H_

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "epserve/v1/control.grpc.pb.h"

namespace epserve::testing {

struct FakeWorkerOptions {
  v1::Hello hello;
  std::int64_t heartbeat_ms = 100;  // 0: none
  // May change the answer to a shard; false: no answer at all.
  std::function<bool(const v1::Shard&, v1::BatchDone*)> on_shard;
  // May change what is reported as the probe's reference.
  std::function<void(v1::PeersOpened*)> on_probe_output;
  // May change the answer to a device region, which is otherwise open.
  std::function<void(const v1::DeviceRegion&, v1::DeviceRegionOpened*)> on_device_region;
  // Whether EpochEnded is answered by EpochQuiesced.
  bool quiesces = true;
};

class FakeWorker {
 public:
  FakeWorker(std::shared_ptr<grpc::Channel> channel, FakeWorkerOptions options);
  ~FakeWorker();  // Closes the stream as a killed process would.

  void Send(const v1::WorkerMessage& message);
  void Kill();  // The stream breaks at once.

  // Whether a message of that kind came within 60 s of real time (a bound against hanging, not a
  // wait that tests rely on); `out` receives the first, or the one after `skipped` others.
  bool WaitFor(v1::CoordinatorMessage::MessageCase kind, v1::CoordinatorMessage* out = nullptr,
               int skipped = 0);
  bool WaitClosed();
  grpc::Status status() const;  // REQUIRES: WaitClosed() returned true
  // Messages of that kind so far, once there are `expected` of them or 60 s have passed: an answer
  // can be acted on before the message that it answers is counted here.
  std::int64_t NumReceived(v1::CoordinatorMessage::MessageCase kind, std::int64_t expected);

 private:
  void Read();
  void Beat();
  void Handle(const v1::CoordinatorMessage& message);
  void HandleShard(const v1::Shard& shard);
  v1::DeviceRegionOpened OpenRegion(const v1::DeviceRegion& region) const;
  void Finish(const v1::Shard& shard);

  const FakeWorkerOptions options_;
  std::unique_ptr<v1::Control::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::WorkerMessage, v1::CoordinatorMessage>> stream_;

  // Of the reader's thread alone.
  v1::Assignment assignment_;
  std::map<std::uint64_t, v1::Shard> waiting_;  // by batch: staged, not finished

  std::mutex write_mu_;
  mutable std::mutex mu_;
  std::condition_variable changed_;
  std::vector<v1::CoordinatorMessage> received_;
  std::uint64_t epoch_ = 0;
  bool closed_ = false;
  grpc::Status status_;

  std::thread reader_;
  std::thread beater_;
};

// What the fake workers compute for rows [T, H] fp32 with ids and weights [T, K].
std::vector<float> FakeOutput(const std::vector<float>& hidden,
                              const std::vector<std::int32_t>& topk_ids,
                              const std::vector<float>& topk_weights, std::int64_t num_tokens);

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_SUPPORT_FAKE_WORKER_H_
