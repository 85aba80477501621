// AsyncInferStream over one call of ModelStreamInfer. Internal to client/cpp; the contract stands
// in client.h.
#ifndef EPSERVE_CLIENT_CPP_ASYNC_INFER_STREAM_H_
#define EPSERVE_CLIENT_CPP_ASYNC_INFER_STREAM_H_

#include <grpcpp/channel.h>

#include <memory>

#include "client/cpp/client.h"
#include "client/cpp/completion_thread.h"

namespace epserve::client {

std::unique_ptr<AsyncInferStream> OpenGrpcAsyncStream(std::shared_ptr<grpc::Channel> channel,
                                                      std::shared_ptr<CompletionThread> thread,
                                                      const StreamOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_ASYNC_INFER_STREAM_H_
