// An RpcServer on loopback, a channel to it, and a log for its handlers.
#ifndef EPSERVE_TESTS_SERVER_RPC_RPC_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_RPC_RPC_FIXTURE_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "server/rpc/rpc_server.h"

namespace epserve::server {

// What handlers were told, in its order.
struct EventLog {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::string> events;  // Guarded by mutex.

  void Add(std::string event) {
    const std::lock_guard lock(mutex);
    events.push_back(std::move(event));
    changed.notify_all();
  }
  std::vector<std::string> WaitFor(const std::string& last) {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, std::chrono::seconds(20),
                     [&] { return !events.empty() && events.back() == last; });
    return events;
  }
  std::ptrdiff_t Count(const std::string& event) {
    const std::lock_guard lock(mutex);
    return std::count(events.begin(), events.end(), event);
  }
};

class RpcTest : public testing::Test {
 protected:
  void Start(int num_threads = 1) {
    grpc::ServerBuilder builder;
    int port = 0;
    server_.Listen("127.0.0.1:0", grpc::InsecureServerCredentials(), &builder, &port);
    ASSERT_TRUE(server_.Start(&builder, num_threads));
    target_ = "127.0.0.1:" + std::to_string(port);
    channel_ = grpc::CreateChannel(target_, grpc::InsecureChannelCredentials());
  }

  RpcServer server_;
  std::string target_;
  std::shared_ptr<grpc::Channel> channel_;
};

}  // namespace epserve::server

#endif  // EPSERVE_TESTS_SERVER_RPC_RPC_FIXTURE_H_
