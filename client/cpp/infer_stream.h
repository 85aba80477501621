// InferStream over one call of ModelStreamInfer. Internal to client/cpp; the contract stands in
// client.h.
#ifndef EPSERVE_CLIENT_CPP_INFER_STREAM_H_
#define EPSERVE_CLIENT_CPP_INFER_STREAM_H_

#include <grpcpp/channel.h>

#include <memory>

#include "client/cpp/client.h"

namespace epserve::client {

std::unique_ptr<InferStream> OpenInferStream(std::shared_ptr<grpc::Channel> channel,
                                             const StreamOptions& options);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_INFER_STREAM_H_
