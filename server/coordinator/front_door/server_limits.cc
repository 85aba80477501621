#include "server/coordinator/front_door/server_limits.h"

#include <grpc/compression.h>
#include <grpcpp/resource_quota.h>

#include <algorithm>
#include <cstdint>

namespace epserve::coordinator {
namespace {

// Far above what a client of ordinary make has open; the next waits inside the client.
constexpr int kMaxStreamsPerConnection = 1024;

// A call's headers, all together; ours and tracing's take less than one KiB.
constexpr int kMaxMetadataBytes = 16 << 10;
// For TLS and HTTP/2 together; a peer that connects and says nothing holds a descriptor so long.
constexpr int kHandshakeTimeoutMs = 10'000;
// A connection without a call is closed after so long; clients connect anew by themselves.
constexpr int kMaxIdleMs = 10 * 60 * 1000;

// What gRPC's own buffers may hold, over all connections, before it holds senders back.
constexpr std::int64_t kMinBufferBytes = std::int64_t{1} << 30;
constexpr std::int64_t kMessagesBuffered = 4;

}  // namespace

void ApplyServerLimits(int max_message_bytes, grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(max_message_bytes);
  builder.SetMaxSendMessageSize(max_message_bytes);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kMaxIdleMs);
  grpc::ResourceQuota quota("epserve");
  quota.Resize(static_cast<std::size_t>(MaxBufferedBytes(max_message_bytes)));
  builder.SetResourceQuota(quota);
}

std::int64_t MaxBufferedBytes(int max_message_bytes) {
  return std::max(kMinBufferBytes, kMessagesBuffered * std::int64_t{max_message_bytes});
}

}  // namespace epserve::coordinator
