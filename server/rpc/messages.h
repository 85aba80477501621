// Protobuf messages to and from the bytes that RpcServer carries.
#ifndef EPSERVE_SERVER_RPC_MESSAGES_H_
#define EPSERVE_SERVER_RPC_MESSAGES_H_

#include <google/protobuf/message.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/common/grpc_status.h"

namespace epserve::server {

// INVALID_ARGUMENT for bytes that are no such message (gRPC itself answers those with an empty
// error message, which clients of the front door take for success).
template <typename Message>
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, Message* message) {
  grpc::ByteBuffer shared(bytes);  // Counts references; copies no bytes.
  if (grpc::SerializationTraits<Message>::Deserialize(&shared, message).ok()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("the message is not a ", message->GetDescriptor()->name()));
}

template <typename Message>
absl::Status SerializeMessage(const Message& message, grpc::ByteBuffer* bytes) {
  bool own_buffer = false;
  return FromGrpcStatus(grpc::SerializationTraits<Message>::Serialize(message, bytes, &own_buffer));
}

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_MESSAGES_H_
