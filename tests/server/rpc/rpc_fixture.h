// An RpcServer on loopback, and a channel to it.
#ifndef EPSERVE_TESTS_SERVER_RPC_RPC_FIXTURE_H_
#define EPSERVE_TESTS_SERVER_RPC_RPC_FIXTURE_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "server/rpc/rpc_server.h"

namespace epserve::server {

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
