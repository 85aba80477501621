// Inference messages to and from the wire's bytes, without the copies that the generated code makes
// of large tensors. Internal to client/cpp. Pure functions.
#ifndef EPSERVE_CLIENT_CPP_INFER_WIRE_H_
#define EPSERVE_CLIENT_CPP_INFER_WIRE_H_

#include <grpcpp/support/byte_buffer.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/tensor_bytes.h"
#include "inference/grpc_service.pb.h"

namespace epserve::client {

inline constexpr char kInferMethod[] = "/inference.GRPCInferenceService/ModelInfer";
inline constexpr char kStreamInferMethod[] = "/inference.GRPCInferenceService/ModelStreamInfer";

// A message whose raw entries stand apart; it has none itself.
template <typename Message>
struct MessageParts {
  Message message;
  std::vector<TensorBytes> raw;
};
using ResponseParts = MessageParts<inference::ModelInferResponse>;
using StreamedParts = MessageParts<inference::ModelStreamInferResponse>;

// A ModelInferRequest.
struct RequestParts {
  std::string head;              // its bytes without raw entries
  std::vector<TensorBytes> raw;  // these come last
};

// Large raw entries are shared with gRPC, for as long as it keeps the buffer.
grpc::ByteBuffer Serialize(const RequestParts& request);

// INTERNAL: the bytes are no such message. Its raw entries are copied once, the first one to the
// memory of `spare` if that will do; those of a megabyte or more stay in the buffer until somebody
// wants them in one piece. The buffer is given back to gRPC once nobody needs it; by reference,
// because gRPC's has no move, and a copy takes a share of every slice.
absl::Status Parse(grpc::ByteBuffer&& bytes, TensorBytes spare, ResponseParts* parts);
absl::Status Parse(grpc::ByteBuffer&& bytes, TensorBytes spare, StreamedParts* parts);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_INFER_WIRE_H_
