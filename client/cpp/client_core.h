// What an InferenceClient and its calls share. Internal to client/cpp.
#ifndef EPSERVE_CLIENT_CPP_CLIENT_CORE_H_
#define EPSERVE_CLIENT_CPP_CLIENT_CORE_H_

#include <grpcpp/channel.h>

#include <memory>

#include "client/cpp/client.h"
#include "client/cpp/retry.h"
#include "inference/grpc_service.grpc.pb.h"

namespace epserve::client {

struct InferenceClient::Core {
  RetryPolicy retry;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<inference::GRPCInferenceService::Stub> stub;
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_CLIENT_CORE_H_
