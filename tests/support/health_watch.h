// Watches one service of grpc.health.v1 on a channel, so that a test can wait for readiness without
// asking again and again. The two messages of that protocol are written and read by hand, because
// the library ships no generated code for them.
//
// Thread safety: every public method may be called from any thread.
#ifndef EPSERVE_TESTS_SUPPORT_HEALTH_WATCH_H_
#define EPSERVE_TESTS_SUPPORT_HEALTH_WATCH_H_

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace epserve::testing {

class HealthWatch {
 public:
  HealthWatch(std::shared_ptr<grpc::Channel> channel, const std::string& service);
  ~HealthWatch();

  // Whether the last status told is, or within 60 s becomes, `serving`.
  bool WaitFor(bool serving);
  // Every status told so far, in order.
  std::vector<bool> seen() const;

 private:
  void Read();

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  grpc::ByteBuffer request_;

  mutable std::mutex mu_;
  std::condition_variable changed_;
  std::vector<bool> seen_;
  std::thread reader_;
};

// One Check: 0 unknown, 1 serving, 2 not serving; -1 where the call failed.
int CheckHealth(const std::shared_ptr<grpc::Channel>& channel, const std::string& service);

}  // namespace epserve::testing

#endif  // EPSERVE_TESTS_SUPPORT_HEALTH_WATCH_H_
