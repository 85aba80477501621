#include "server/coordinator/front_door/server_limits.h"

#include <grpc/compression.h>

namespace epserve::coordinator {

void ApplyServerLimits(int max_message_bytes, grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(max_message_bytes);
  builder.SetMaxSendMessageSize(max_message_bytes);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
}

}  // namespace epserve::coordinator
