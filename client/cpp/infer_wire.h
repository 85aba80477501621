// Inference messages to and from the wire's bytes, without the copies that the generated code makes
// of large tensors. Internal to client/cpp. Pure functions.
#ifndef EPSERVE_CLIENT_CPP_INFER_WIRE_H_
#define EPSERVE_CLIENT_CPP_INFER_WIRE_H_

#include <grpcpp/support/byte_buffer.h>

#include "absl/status/status.h"
#include "inference/grpc_service.pb.h"

namespace epserve::client {

inline constexpr char kInferMethod[] = "/inference.GRPCInferenceService/ModelInfer";
inline constexpr char kStreamInferMethod[] = "/inference.GRPCInferenceService/ModelStreamInfer";

// The raw entries become gRPC's as they are.
grpc::ByteBuffer Serialize(inference::ModelInferRequest message);

// INTERNAL: the bytes are no such message. Its raw entries are copied once.
absl::Status Parse(grpc::ByteBuffer bytes, inference::ModelInferResponse* message);
absl::Status Parse(grpc::ByteBuffer bytes, inference::ModelStreamInferResponse* message);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_INFER_WIRE_H_
